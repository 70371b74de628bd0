"""Metrics for people: a row {"group/name": value} as text, and which keys are shown together.

A value is a number or, of a distribution, the list of its values (one per latent dimension).
Metric keys are paths: `train/loss`, `eval/bits_per_dim`, `time/images_per_second`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

Value = float | list[float]
WANDB_STEP = "trainer/step"  # the x axis there; W&B's own step counts calls of log()


class Panel(NamedTuple):
    """Curves that are drawn together, in the report and in the W&B workspace."""

    title: str
    unit: str
    keys: tuple[str, ...]
    x: str = "step"


SECTIONS = {
    "Learning": (
        Panel("-ELBO", "nats/image", ("train/neg_elbo_nats", "eval/neg_elbo_nats")),
        Panel("-IWAE bound", "nats/image", ("train/neg_iwae_nats",)),
        Panel("Bits/dim", "", ("train/bits_per_dim", "eval/bits_per_dim")),
        Panel("Distortion", "nats/image", ("train/distortion_nats", "eval/distortion_nats")),
        Panel("Rate", "nats/image", ("train/rate_nats", "eval/rate_nats")),
        Panel("Beta", "", ("train/beta",)),
    ),
    "Latents": (
        Panel("Active units", "", ("latent/active_units",)),
        Panel("Mutual information", "nats, lower bound", ("latent/mutual_information_nats",)),
        Panel("Posterior variance", "prior: 1", ("latent/posterior_variance",)),
        Panel("Rate per unit", "nats/image", ("latent/kl_nats_per_unit",), x="unit"),
    ),
    "Optimizer": (
        Panel("Learning rate", "", ("optim/lr",)),
        Panel("Gradient norm", "before clipping", ("optim/grad_norm",)),
        Panel("Skipped steps", "", ("optim/skipped_steps",)),
        Panel("Loss scale", "", ("optim/loss_scale",)),
    ),
    "Machine": (
        Panel("Throughput", "images/s", ("time/images_per_second",)),
        Panel("Waiting for data", "fraction of time", ("time/data_wait_fraction",)),
        Panel("Step time", "seconds", ("time/step_seconds",)),
        Panel("Model FLOPs utilisation", "of peak", ("time/mfu",)),
        Panel("Memory", "GiB", ("system/memory_gib", "system/device_memory_gib")),
        Panel("Skipped samples", "", ("data/skipped_samples",)),
    ),
}
IMAGES = {
    "samples": "Prior samples",
    "reconstructions": "Inputs above their reconstructions",
    "interpolations": "Interpolations between inputs",
    "traversals": "Traversals of the most active latent units",
    "by_class": "Inputs beside their reconstructions, by class",
    "worst": "Worst reconstructions",
}

# The console leaves out what other figures of its line say; log.jsonl and W&B have every key.
_HIDDEN = re.compile(
    r"train/(neg_elbo_nats|beta|bits_per_dim)|optim/(lr|loss_scale)|latent/.*"
    r"|data/(epoch|images_seen)|eval/num_images|time/(checkpoint_stall_seconds|step_seconds)"
    r"|system/memory_gib"
)
_HIDDEN_AT_ZERO = re.compile(r"optim/(skipped|spike)_steps|(data|eval)/skipped_samples")
_LITTLE_WAITING = 0.1  # part of the time; from here on waiting for data costs speed


def format_number(value: float) -> str:
    """Four significant digits, without an exponent from 0.001 up to a billion."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value)):
        return f"{int(value)}" if abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def format_row(row: Mapping[str, Value]) -> str:
    """`loss=104.2 images_per_second=1834 ...`, in the order of the row."""
    pairs = []
    for key, value in row.items():
        if isinstance(value, list) or _HIDDEN.fullmatch(key):
            continue
        if value == 0 and _HIDDEN_AT_ZERO.fullmatch(key):
            continue
        if key == "time/data_wait_fraction" and value <= _LITTLE_WAITING:
            continue
        if key == "time/left_seconds":
            pairs.append(f"left={format_duration(value)}")
        else:
            name = key.removeprefix("train/").removeprefix("time/")
            pairs.append(f"{name}={format_number(value)}")
    return " ".join(pairs)


def format_duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h10m`, `4d03h`; `?` while unknown (not finite or negative)."""
    if not 0 <= seconds < math.inf:
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    parts = (days, "d", h, "h"), (hours, "h", m, "m"), (minutes, "m", s, "s")
    texts = (f"{n}{unit}{rest:02d}{small}" for n, unit, rest, small in parts if n)
    return next(texts, f"{s}s")
