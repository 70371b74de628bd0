"""Learning rate and beta as functions of the step, counted from 0: no state, exact at a resume.

    lr(k)   = lr * (k + 1) / warmup                                       k < warmup
            = lr * (f + (1 - f) * (1 + cos(pi * t)) / 2)                  after it, schedule=cosine
    beta(k) = beta * r

with t = (k + 1 - warmup) / (steps - warmup) and f = final_lr_fraction: the rate is lr at the end of
the warm-up and f * lr at the last step. beta rises `beta_cycles` times from 0 (Fu et al. 2019), r
going from 0 to 1 in beta_warmup_steps, and stays up as long before it starts again; after the last
rise it stays.
"""

from __future__ import annotations

import math

from vae_dist.config.schema import ObjectiveConfig, OptimizerConfig


def lr_at(config: OptimizerConfig, num_steps: int, step: int) -> float:
    """Learning rate of step `step` of a run of `num_steps` steps; past its end, that of the last
    one."""
    done = step + 1
    if done < config.warmup_steps:
        return config.lr * done / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min((done - config.warmup_steps) / max(num_steps - config.warmup_steps, 1), 1.0)
    final = config.final_lr_fraction
    return config.lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def beta_at(config: ObjectiveConfig, step: int) -> float:
    """Weight of the rate at step `step`."""
    warmup = config.beta_warmup_steps
    last_rise = 2 * warmup * (config.beta_cycles - 1)  # the step that it begins with
    since = step - last_rise if step >= last_rise else step % (2 * warmup)
    if since >= warmup:
        return config.beta
    return config.beta * since / warmup
