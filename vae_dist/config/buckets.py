"""The rules of aspect buckets, data.resolution={area: PIXELS, multiple: PIXELS, max_aspect: RATIO}.

In: a config whose data.resolution is a mapping. Out: for each broken rule the keys that it is
about, and a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from vae_dist.config.automatic import MIN_SLOTS_OF_WINDOW, slots_of
from vae_dist.config.keys import shown
from vae_dist.config.schema import TrainConfig

NAME = "data.resolution"
EXAMPLE = "{area: 65536, multiple: 16, max_aspect: 2.0}"
Rule = tuple[tuple[str, ...], str]


def bucket_rules(config: TrainConfig) -> Iterator[Rule]:
    resolution = config.data.resolution
    if sentence := _problem(resolution):
        yield (NAME,), f"{NAME}={shown(resolution)} {sentence}; for example {NAME}={EXAMPLE}"
    if config.model.latent == "vector":
        yield (
            (NAME, "model.latent"),
            f"{NAME}={shown(resolution)} makes images of several sizes, but model.latent=vector "
            "works at one; use model.latent=spatial, or data.resolution=N",
        )
    yield from _slots(config)


def _problem(resolution: dict[str, Any]) -> str:
    if set(resolution) != {"area", "multiple", "max_aspect"}:
        return "must have area, multiple and max_aspect"
    area, multiple, largest = (resolution[k] for k in ("area", "multiple", "max_aspect"))
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in (area, multiple)):
        return "must have positive whole numbers of pixels as area and multiple"
    if not (isinstance(largest, int | float) and 1 <= largest < math.inf):
        return "must have a max_aspect, longer side / shorter side, of at least 1"
    if area < multiple * multiple:
        return f"has room for no bucket: area must be at least multiple^2 = {multiple * multiple}"
    return ""


def _slots(config: TrainConfig) -> Iterator[Rule]:
    """A window holds whole slots; ranks that gather weights in each forward need equally many."""
    data, training = config.data, config.training
    if training.batch_size < 1 or data.slots < 0:
        return
    slots = slots_of(config)
    if training.batch_size % slots:
        return  # said elsewhere
    per_slot = training.batch_size // slots
    window = data.window
    if isinstance(window, int) and window >= 1 and window % per_slot:
        fitting = per_slot * max(MIN_SLOTS_OF_WINDOW, window // per_slot)
        yield (
            ("data.window", NAME, "data.slots", "training.batch_size"),
            f"data.window={window} is not a multiple of the {per_slot} images of a slot "
            f"(training.batch_size / data.slots), which share a shape; try {fitting}",
        )
    if config.runtime.parallel == "fsdp" and training.microbatch_size != per_slot:
        yield (
            ("runtime.parallel", NAME, "training.microbatch_size"),
            "runtime.parallel=fsdp gathers weights in every forward, so all processes need equally "
            "many forwards, but aspect buckets make slots of different shapes: set "
            f"training.microbatch_size={per_slot}, the images of one slot, or runtime.parallel=ddp",
        )
