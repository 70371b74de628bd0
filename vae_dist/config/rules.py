"""What the checks of all commands are written with: a broken rule, the range of each number, sizes.

In: a filled config dataclass. Out: a `Violation` for each number out of its range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from vae_dist.config.keys import keys, shown

# Range of every number that has one on its own: (smallest, largest), both allowed.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "data.channels": (1, math.inf),
    "data.slots": (0, math.inf),
    "data.mask_fraction": (0, 1),
    "data.window_bytes": (1, math.inf),
    "data.cache_bytes": (0, math.inf),
    "data.workers": (0, math.inf),
    "data.max_skipped_fraction": (0, 1),
    "data.max_pixels": (1, math.inf),
    "model.latent_channels": (1, math.inf),
    "model.patch": (1, math.inf),
    "model.norm_groups": (1, math.inf),
    "model.num_classes": (0, math.inf),
    "model.label_dropout": (0, 1),
    "objective.beta": (0, math.inf),
    "objective.beta_warmup_steps": (0, math.inf),
    "objective.beta_cycles": (1, math.inf),
    "objective.free_bits": (0, math.inf),
    "objective.importance_samples": (1, math.inf),
    "objective.scale_equivariance": (0, math.inf),
    "objective.latent_noise": (0, math.inf),
    "adversarial.weight": (0, math.inf),
    "adversarial.start_step": (0, math.inf),
    "adversarial.warmup_steps": (0, math.inf),
    "adversarial.ramp_steps": (0, math.inf),
    "adversarial.clip_grad_norm": (0, math.inf),
    "adversarial.channels": (1, math.inf),
    "adversarial.layers": (1, 8),
    "adversarial.r1": (0, math.inf),
    "adversarial.r1_every": (1, math.inf),
    "likelihood.mixtures": (1, math.inf),
    "optimizer.warmup_steps": (0, math.inf),
    "optimizer.final_lr_fraction": (0, 1),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.clip_grad_norm": (0, math.inf),
    "training.steps": (1, math.inf),
    "training.batch_size": (1, math.inf),
    "training.max_consecutive_nonfinite": (1, math.inf),
    "training.spike_factor": (0, math.inf),
    "training.checksum_every": (0, math.inf),
    "evaluation.every": (0, math.inf),
    "evaluation.batch_size": (1, math.inf),
    "checkpoint.every": (0, math.inf),
    "checkpoint.keep_last": (1, math.inf),
    "log.every": (1, math.inf),
    "log.images_every": (0, math.inf),
    "log.num_images": (1, math.inf),
    "runtime.threads": (0, math.inf),
    "runtime.timeout_s": (1, math.inf),
    "num_images": (1, math.inf),
    "mask_fraction": (0, 1),
    "draws": (1, math.inf),
    "max_images": (0, math.inf),
    "prior_images": (0, math.inf),
    "samples": (0, math.inf),
    "chunk": (0, math.inf),
    "threads": (0, math.inf),
    "tile": (0, math.inf),
    "batch_size": (1, math.inf),
    "temperature": (0, math.inf),
    "quality": (1, 100),
    "max_pixels": (1, math.inf),
    "max_skipped_fraction": (0, 1),
    "validation": (0, math.inf),
    "workers": (0, math.inf),
}
POSITIVE = (
    "perceptual.weight",
    "adversarial.max_weight",
    "adversarial.lr",
    "likelihood.sigma",
    "likelihood.min_sigma",
    "model.initial_sigma",
    "optimizer.lr",
    "optimizer.eps",
    "shard_mb",
)


WITHOUT = {"perceptual.weight": "; perceptual.kind=none trains without this term"}


class Violation(NamedTuple):
    """A broken rule and the keys that it is about."""

    keys: tuple[str, ...]
    text: str
    is_without_effect: bool = False  # the key does nothing beside the others


def rule(name: str, value: Any, sentence: str, *others: str) -> Violation:
    return Violation((name, *others), f"{name}={shown(value)} {sentence}")


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def ignored(config: Any, name: str, because: str) -> Iterator[Violation]:
    """A knob that would be ignored is an error: nobody should believe that it has an effect."""
    value, default = value_of(config, name), keys(type(config))[name].default
    if value != default:
        sentence = f"has no effect with {because}; remove it (default {shown(default)})"
        yield rule(name, value, sentence)._replace(is_without_effect=True)


def out_of_range(config: Any) -> Iterator[Violation]:
    for name, key in keys(type(config)).items():
        value = value_of(config, name)
        if key.type is float and not math.isfinite(value):
            yield rule(name, value, "is not a finite number")
        elif name in POSITIVE and value <= 0:
            yield rule(name, value, "must be more than 0" + WITHOUT.get(name, ""))
        elif name in RANGES:
            low, high = RANGES[name]
            if value < low:
                yield rule(name, value, f"must be at least {shown(low)}")
            elif value > high:
                yield rule(name, value, f"must be at most {shown(high)}")


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_size(value: Any) -> bool:
    """N or [H, W]."""
    pair = isinstance(value, list) and len(value) == 2 and all(map(is_count, value))
    return pair or is_count(value)
