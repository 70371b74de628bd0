"""Learning rate and beta as functions of the step, counted from 0: no state, exact at a resume.

    lr(k)   = lr * (k + 1) / warmup                                       k < warmup
            = lr * (f + (1 - f) * (1 + cos(pi * t)) / 2)                  after it, schedule=cosine
    beta(k) = beta * min(k / warmup, 1)

with t = (k + 1 - warmup) / (steps - warmup) and f = final_lr_fraction: the rate is lr at the end of
the warm-up and f * lr at the last step.
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
    if step >= config.beta_warmup_steps:
        return config.beta
    return config.beta * step / config.beta_warmup_steps
