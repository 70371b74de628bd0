"""The rules between keys, and the values that `auto` stands for.

In: a filled config dataclass. Out: one sentence per broken rule (key, value, rule, way out), found
before any data is read or any device touched. With ips = training.batch_size / data.slots:

    data.slots divides training.batch_size, the number of processes divides data.slots,
    ips divides training.microbatch_size,
    2 * data.window * training.batch_size * mean sample bytes <= data.window_bytes
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import keys, shown
from vae_dist.config.schema import RunCommand, TrainConfig

MAX_AUTOMATIC_SLOTS = 64
MAX_AUTOMATIC_WINDOW = 32

# Range of every number that has one on its own: (smallest, largest), both allowed.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "data.slots": (0, math.inf),
    "data.window_bytes": (1, math.inf),
    "data.workers": (0, math.inf),
    "data.max_skipped_fraction": (0, 1),
    "data.max_pixels": (1, math.inf),
    "model.latent_channels": (1, math.inf),
    "model.patch": (1, math.inf),
    "model.blocks": (1, math.inf),
    "model.norm_groups": (1, math.inf),
    "objective.beta": (0, math.inf),
    "objective.beta_warmup_steps": (0, math.inf),
    "optimizer.warmup_steps": (0, math.inf),
    "optimizer.final_lr_fraction": (0, 1),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.clip_grad_norm": (0, math.inf),
    "training.steps": (1, math.inf),
    "training.batch_size": (1, math.inf),
    "training.microbatch_size": (0, math.inf),
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
    "batch_size": (1, math.inf),
    "temperature": (0, math.inf),
    "quality": (1, 100),
    "max_pixels": (1, math.inf),
    "max_skipped_fraction": (0, 1),
    "validation": (0, math.inf),
    "workers": (0, math.inf),
}
POSITIVE = (
    "likelihood.sigma",
    "likelihood.min_sigma",
    "optimizer.lr",
    "optimizer.eps",
    "shard_mb",
)


class Violation(NamedTuple):
    """A broken rule and the keys that it is about."""

    keys: tuple[str, ...]
    text: str


def problems(config: TrainConfig) -> list[str]:
    """What is wrong with the config, one sentence each; empty when nothing is."""
    return [violation.text for violation in violations(config)]


def violations(config: TrainConfig) -> Iterator[Violation]:
    out_of_range = list(_ranges(config))
    yield from out_of_range
    bad = {name for violation in out_of_range for name in violation.keys}
    for rules in (_data, _slots, _model, _likelihood, _optimizer):
        # A rule that divides by a count needs the count to be good.
        yield from (rule for rule in rules(config) if not bad & set(rule.keys))


def command_violations(command: Any) -> Iterator[Violation]:
    """The rules of the other commands' dataclasses."""
    yield from _ranges(command)
    if isinstance(command, RunCommand):
        checkpoint = command.checkpoint
        is_step = checkpoint.isascii() and checkpoint.isdigit()
        if checkpoint not in ("latest", "best") and not is_step:
            yield _rule("checkpoint", checkpoint, "is none of latest, best and a step number")
    resolution = getattr(command, "resolution", "trained")
    if resolution != "trained" and not _is_size(resolution):
        yield _rule("resolution", resolution, "is none of trained, N and [H, W] in pixels")


def _rule(name: str, value: Any, sentence: str, *others: str) -> Violation:
    return Violation((name, *others), f"{name}={shown(value)} {sentence}")


def _get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _ranges(config: Any) -> Iterator[Violation]:
    for name, key in keys(type(config)).items():
        value = _get(config, name)
        if key.type is float and not math.isfinite(value):
            yield _rule(name, value, "is not a finite number")
        elif name in POSITIVE and value <= 0:
            yield _rule(name, value, "must be more than 0")
        elif name in RANGES:
            low, high = RANGES[name]
            if value < low:
                yield _rule(name, value, f"must be at least {shown(low)}")
            elif value > high:
                yield _rule(name, value, f"must be at most {shown(high)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value: Any) -> bool:
    """N or [H, W]."""
    pair = isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))
    return pair or _is_count(value)


def _is_shards(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and item.strip() for item in items)


def _is_mixture(value: Any) -> bool:
    """[{path: SHARDS, weight: NUMBER}, ...]; a weight may be left away."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(part, dict)
            and set(part) <= {"path", "weight"}
            and _is_shards(part.get("path"))
            and isinstance(part.get("weight", 1), int | float)
            and 0 < part.get("weight", 1) < math.inf
            for part in value
        )
    )


def _ignored(config: TrainConfig, name: str, because: str) -> Iterator[Violation]:
    """A knob that would be ignored is an error: nobody should believe that it has an effect."""
    value, default = _get(config, name), keys(TrainConfig)[name].default
    if value != default:
        yield _rule(
            name, value, f"has no effect with {because}; remove it (default {shown(default)})"
        )


def _data(config: TrainConfig) -> Iterator[Violation]:
    data = config.data
    for name in ("data.train", "data.validation"):
        value = _get(config, name)
        if not (_is_shards(value) or (name == "data.train" and _is_mixture(value))):
            yield _rule(name, value, "is no folder of *.tar, brace pattern, URL or list of these")
    if data.channels not in (1, 3):
        yield _rule("data.channels", data.channels, "must be 1 (grey) or 3 (RGB)")
    if data.resolution == "native":
        because = "data.resolution=native (images are taken as they are)"
        yield from _ignored(config, "data.crop", because)
    elif not _is_size(data.resolution):
        yield _rule("data.resolution", data.resolution, "is none of N, [H, W] and native")
    if data.window != "auto" and not _is_count(data.window):
        yield _rule("data.window", data.window, "is neither auto nor a count of samples")
    if data.bundled == "digits":
        yield from _bundled_digits(config)


def _bundled_digits(config: TrainConfig) -> Iterator[Violation]:
    """The digits are written to FOLDER/train and FOLDER/validation, and nowhere else."""
    train, validation = config.data.train, config.data.validation
    if not (_is_shards(train) and _is_shards(validation)):
        return
    written = isinstance(train, str) and isinstance(validation, str)
    if written:
        first, second = PurePath(train), PurePath(validation)
        written = first.parent == second.parent
        written = written and (first.name, second.name) == ("train", "validation")
    if not written:
        yield Violation(
            ("data.bundled", "data.train", "data.validation"),
            "data.bundled=digits writes FOLDER/train and FOLDER/validation, but "
            f"data.train={shown(train)} and data.validation={shown(validation)}; "
            "give these two, or set data.bundled=none for your own shards",
        )


def _slots(config: TrainConfig) -> Iterator[Violation]:
    batch_size, slots = config.training.batch_size, config.data.slots
    names = ("data.slots", "training.batch_size")
    if batch_size < 1 or slots < 0:
        return
    if slots and batch_size % slots:
        near = sorted({batch_size - batch_size % slots, batch_size - batch_size % slots + slots})
        sizes = " or ".join(str(size) for size in near if size)
        yield Violation(
            names,
            f"training.batch_size={batch_size} is not a multiple of data.slots={slots}; "
            f"try training.batch_size={sizes}, or data.slots={default_slots(batch_size)}",
        )
        return
    microbatch = config.training.microbatch_size
    per_slot = batch_size // (slots or default_slots(batch_size))
    involved = (*names, "training.microbatch_size")
    given = f"training.microbatch_size={microbatch}"
    if microbatch > batch_size:
        yield Violation(
            involved,
            f"{given} is more than training.batch_size={batch_size}; "
            "use 0 for the whole share of a process",
        )
    elif microbatch % per_slot:
        fitting = max(per_slot, microbatch - microbatch % per_slot)
        yield Violation(
            involved,
            f"{given} is not a multiple of the {per_slot} images of a slot "
            f"(training.batch_size / data.slots); try {fitting}",
        )


def _model(config: TrainConfig) -> Iterator[Violation]:
    model = config.model
    if not model.channels or not all(map(_is_count, model.channels)):
        yield _rule("model.channels", model.channels, "must be one positive width for each level")
    elif model.norm_groups >= 1 and any(width % model.norm_groups for width in model.channels):
        yield Violation(
            ("model.norm_groups", "model.channels"),
            f"model.norm_groups={model.norm_groups} does not divide every width of "
            f"model.channels={shown(model.channels)}; {math.gcd(*model.channels)} or a divisor "
            "of it does",
        )


def _likelihood(config: TrainConfig) -> Iterator[Violation]:
    likelihood = config.likelihood
    if likelihood.kind == "bernoulli":
        if config.data.channels != 1:
            yield Violation(
                ("likelihood.kind", "data.channels"),
                "likelihood.kind=bernoulli is for binarised grey images: set data.channels=1 "
                f"(it is {config.data.channels}), or likelihood.kind=gaussian",
            )
        knobs = ("likelihood.variance", "likelihood.sigma", "likelihood.min_sigma")
        for name in (*knobs, "data.dequantize"):
            yield from _ignored(config, name, "likelihood.kind=bernoulli")
    elif likelihood.variance == "fixed":
        yield from _ignored(config, "likelihood.min_sigma", "likelihood.variance=fixed")
    else:
        yield from _ignored(
            config, "likelihood.sigma", f"likelihood.variance={likelihood.variance}"
        )


def _optimizer(config: TrainConfig) -> Iterator[Violation]:
    optimizer, training = config.optimizer, config.training
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        yield _rule("optimizer.betas", optimizer.betas, "must be two numbers in [0, 1)")
    if optimizer.schedule == "constant":
        yield from _ignored(config, "optimizer.final_lr_fraction", "optimizer.schedule=constant")
    if not 0 <= training.ema_decay < 1:
        yield _rule("training.ema_decay", training.ema_decay, "must be in [0, 1)")
    for name in ("optimizer.warmup_steps", "objective.beta_warmup_steps"):
        if (steps := _get(config, name)) > training.steps:
            sentence = (
                f"is more than training.steps={training.steps}; try {name}={training.steps // 10}"
            )
            yield _rule(name, steps, sentence, "training.steps")


# ---- slots, processes and what `auto` stands for ----


def divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def default_slots(batch_size: int) -> int:
    """What data.slots=0 stands for: one image a slot, but at most 64 slots."""
    return max(part for part in divisors(batch_size) if part <= MAX_AUTOMATIC_SLOTS)


def world_size_problem(slots: int, world: int) -> str | None:
    """Why `world` processes cannot share `slots` slots, or None when they can."""
    if slots % world == 0:
        return None
    fitting = ", ".join(str(part) for part in divisors(slots))
    return (
        f"{world} processes cannot share data.slots={slots} evenly; the numbers of processes that "
        f"work are {fitting}. Start one of these, or begin a run with data.slots set to a multiple "
        f"of {world} that divides training.batch_size"
    )


def launch_problem(environment: Mapping[str, str]) -> str | None:
    """Why these processes are not those that the launcher promised, or None when they are.

    A promise is EXPECTED_WORLD_SIZE, which a launch script sets, or, inside a step of srun,
    SLURM_NTASKS: each task starts at least one process, and all of them are of one run.
    """
    world = int(environment.get("WORLD_SIZE", "1"))
    expected = environment.get("EXPECTED_WORLD_SIZE", "")
    if expected:
        if world == int(expected):
            return None
        return (
            f"EXPECTED_WORLD_SIZE={expected} processes were promised but WORLD_SIZE={world}: the "
            "launcher's options do not fit the launch script, and each part would train alone. "
            "Start with launch/slurm.sbatch or `accelerate launch --multi_gpu --num_processes "
            f"{expected}`, or unset EXPECTED_WORLD_SIZE"
        )
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    if "SLURM_STEP_ID" not in environment or world % tasks == 0:
        return None
    return (
        f"srun started SLURM_NTASKS={tasks} tasks but WORLD_SIZE={world}: each task would train "
        "alone. Start with `sbatch launch/slurm.sbatch ...`, or set EXPECTED_WORLD_SIZE="
        f"{world} if each task is meant to be a run of its own"
    )


def resolve(config: TrainConfig, *, mean_sample_bytes: float, has_accelerator: bool) -> TrainConfig:
    """A copy in which data.slots, data.window and training.precision have concrete values.

    `mean_sample_bytes` comes from the index of the training shards: so slots and window are
    properties of config and data; the precision alone depends on the machine.
    """
    resolved = copy.deepcopy(config)
    data, training = resolved.data, resolved.training
    data.slots = data.slots or default_slots(training.batch_size)
    if data.window == "auto":
        data.window = _automatic_window(config, mean_sample_bytes)
    if training.precision == "auto":
        training.precision = "bf16" if has_accelerator else "no"
    elif training.precision == "fp16" and not has_accelerator:
        raise ConfigError(
            "training.precision=fp16 needs an accelerator, and there is none; use bf16 or no"
        )
    return resolved


def _automatic_window(config: TrainConfig, mean_sample_bytes: float) -> int:
    # Twice: a lane reads its next window while the present one is being used up.
    row_bytes = 2 * config.training.batch_size * mean_sample_bytes
    window = MAX_AUTOMATIC_WINDOW
    while window > 1 and window * row_bytes > config.data.window_bytes:
        window //= 2
    if window * row_bytes > config.data.window_bytes:
        raise ConfigError(
            f"data.window_bytes={config.data.window_bytes} holds less than two samples of each "
            f"lane; data.window=auto needs at least {math.ceil(row_bytes)}"
        )
    return window
