"""The values that `auto` stands for: one function decides, and the result is read-only.

In: a config, and facts of machines and data that are the same on all ranks. Out: a config that
changes no more. What is found out while training (a microbatch that fits) is state of the run.

    the number of processes divides data.slots,
    2 * data.window * training.batch_size * mean sample bytes <= WINDOW_BYTES, if it can be
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig

MAX_AUTOMATIC_SLOTS = 64
MAX_AUTOMATIC_WINDOW = 32  # rows; with aspect buckets slots
WINDOW_BYTES = 4 * 2**30  # that automatic windows hold, over all processes
MIN_IMAGES_OF_BUCKET = 4  # of a slot, which goes through the model as one shape
MIN_SLOTS_OF_WINDOW = 4  # with aspect buckets: enough to sort by aspect
EVALUATION_BATCH = 32  # images at most, where the microbatch is found while training
COMPILED = ("true", "blocks")  # values of runtime.compile
SIXTEEN_BITS = ("bf16", "fp16")  # of training.precision


@dataclass(frozen=True)
class Facts:
    """What `auto` depends on beside the config."""

    has_accelerator: bool = False
    has_bf16: bool = False  # every rank's device computes in it rather than emulating it
    has_lpips: bool = False  # every rank finds the weights of LPIPS without a network
    compiler_problem: str | None = None  # what some rank lacks for torch.compile
    alignment_width: int = 0  # of the features of objective.alignment; 0 until it is known
    mean_sample_bytes: float | None = None  # of the training shards; None until they are known
    world: int = 1  # processes


def resolve(config: TrainConfig, facts: Facts) -> TrainConfig:
    """A read-only copy in which each `auto` has its value, data.window once the shards are known.

    training.microbatch_size=auto stays, for it depends on memory that is free at the moment.
    Raises ConfigError where what is asked for cannot be.
    """
    config = copy.deepcopy(config)
    data, training, runtime = config.data, config.training, config.runtime
    data.slots = slots_of(config)
    if data.window == "auto" and facts.mean_sample_bytes is not None:
        data.window = _automatic_window(config, facts.mean_sample_bytes)
    if config.perceptual.kind == "auto":
        config.perceptual.kind = "lpips" if facts.has_lpips else "structure"
    asked, width = config.objective.alignment_width, facts.alignment_width
    if width and asked not in ("auto", width):
        raise ConfigError(f"objective.alignment_width={asked}: the features have {width} values")
    config.objective.alignment_width = width or asked
    if training.precision == "auto":
        training.precision = "bf16" if facts.has_bf16 else "no"
    is_on_16_bits = facts.has_accelerator and training.precision in SIXTEEN_BITS
    if runtime.compile == "auto":
        is_fixed = runtime.parallel == "ddp" and not has_any_size(config)
        can_compile = facts.has_accelerator and facts.compiler_problem is None
        runtime.compile = "true" if is_fixed and can_compile else "false"
    is_compiled = runtime.compile in COMPILED
    if runtime.channels_last == "auto":
        # in eager mode GroupNorm goes back to the other layout, and back again
        runtime.channels_last = "true" if is_on_16_bits and is_compiled else "false"
    if is_compiled and has_buckets(config) and training.microbatch_size == 0:
        # how many slots of a step share a bucket varies: each number would be a shape of its own
        training.microbatch_size = images_per_slot(config)
    if config.evaluation.batch_size == "auto":
        share = max(1, training.batch_size // facts.world)
        fitting = min(share, EVALUATION_BATCH)
        microbatch = training.microbatch_size
        config.evaluation.batch_size = fitting if microbatch == "auto" else microbatch or share
    if training.precision == "fp16" and not facts.has_accelerator:
        raise ConfigError("training.precision=fp16 needs an accelerator; use bf16 or no")
    problem = facts.compiler_problem
    if training.precision == "bf16" and not facts.has_accelerator:
        problem = problem or "torch 2.13 gets gradients of bfloat16 wrong on CPU"
    if is_compiled and problem:
        raise ConfigError(f"runtime.compile={runtime.compile}: {problem}; use false")
    config.freeze()
    return config


def divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def has_buckets(config: TrainConfig) -> bool:
    """Whether images go to aspect buckets, so that a slot's images share one of several sizes."""
    return isinstance(config.data.resolution, dict)


def has_any_size(config: TrainConfig) -> bool:
    """Whether training images may be of any size, each a slot and a forward of its own."""
    is_native = config.data.resolution == "native" and config.model.latent == "spatial"
    in_step = config.runtime.parallel == "ddp" or config.training.microbatch_size == 1
    return is_native and in_step and images_per_slot(config) == 1


def default_slots(batch_size: int, *, buckets: bool = False) -> int:
    """What data.slots=0 stands for: the most slots that divide the batch, with limits."""
    largest = max(1, batch_size // MIN_IMAGES_OF_BUCKET) if buckets else batch_size
    fitting = range(1, min(largest, MAX_AUTOMATIC_SLOTS) + 1)
    return max(part for part in fitting if batch_size % part == 0)


def slots_of(config: TrainConfig) -> int:
    """data.slots, or what 0 stands for."""
    buckets = has_buckets(config)
    return config.data.slots or default_slots(config.training.batch_size, buckets=buckets)


def images_per_slot(config: TrainConfig) -> int:
    return config.training.batch_size // slots_of(config)


def world_size_problem(config: TrainConfig, world: int) -> str | None:
    """Why `world` processes cannot share the slots, or None when they can."""
    slots = slots_of(config)
    if slots % world == 0:
        return None
    return (
        f"{world} processes cannot share data.slots={slots} evenly; the numbers of processes that "
        f"work are {', '.join(map(str, divisors(slots)))}. Start one of these, or begin a run with "
        f"data.slots set to a multiple of {world} that divides training.batch_size"
    )


def _automatic_window(config: TrainConfig, mean_sample_bytes: float) -> int:
    # Twice: the next window is read while the present one is being used up.
    row_bytes = 2 * config.training.batch_size * mean_sample_bytes
    smallest = MIN_SLOTS_OF_WINDOW if has_buckets(config) else 1
    window = MAX_AUTOMATIC_WINDOW
    while window > smallest and window * row_bytes > WINDOW_BYTES:
        window //= 2
    return window * images_per_slot(config) if has_buckets(config) else window
