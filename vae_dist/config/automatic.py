"""The values that `auto` stands for, and the numbers of processes that can share a run.

the number of processes divides data.slots,
2 * data.window * training.batch_size * mean sample bytes <= data.window_bytes
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig

MAX_AUTOMATIC_SLOTS = 64
MAX_AUTOMATIC_WINDOW = 32  # samples of a lane; with aspect buckets slots of a lane
MIN_IMAGES_OF_BUCKET = 4  # of a slot, which goes through the model as one shape
MIN_SLOTS_OF_WINDOW = 4  # with aspect buckets: enough to sort by aspect


def divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def has_buckets(config: TrainConfig) -> bool:
    """Whether images go to aspect buckets, so that a slot's images share one of several sizes."""
    return isinstance(config.data.resolution, dict)


def default_slots(batch_size: int, *, buckets: bool = False) -> int:
    """What data.slots=0 stands for: one image a slot, but at most 64 slots; with aspect buckets at
    least MIN_IMAGES_OF_BUCKET images a slot, where the batch has as many."""
    largest = min(MAX_AUTOMATIC_SLOTS, batch_size)
    if buckets:
        largest = max(1, min(largest, batch_size // MIN_IMAGES_OF_BUCKET))
    return max(part for part in divisors(batch_size) if part <= largest)


def slots_of(config: TrainConfig) -> int:
    """data.slots, or what 0 stands for."""
    return config.data.slots or default_slots(
        config.training.batch_size, buckets=has_buckets(config)
    )


def world_size_problem(config: TrainConfig, world: int) -> str | None:
    """Why `world` processes cannot share the slots, or None when they can."""
    slots = slots_of(config)
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

    A promise is EXPECTED_WORLD_SIZE, which a launch script sets, or the tasks of a SLURM job.
    """
    world = int(environment.get("WORLD_SIZE", "1"))
    expected = environment.get("EXPECTED_WORLD_SIZE", "")
    if not expected:
        return _slurm_problem(environment, world)
    if world == int(expected):
        return None
    return (
        f"EXPECTED_WORLD_SIZE={expected} processes were promised but WORLD_SIZE={world}: the "
        "launcher's options do not fit the launch script, and each part would train alone. "
        "Start with launch/slurm.sbatch or `accelerate launch --multi_gpu --num_processes "
        f"{expected}`, or unset EXPECTED_WORLD_SIZE"
    )


def _slurm_problem(environment: Mapping[str, str], world: int) -> str | None:
    """In a step of srun each task starts at least one process, and all of them are of one run. A
    batch script with several tasks is not meant for one process; a shell of salloc may be."""
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    problem = ""
    if "SLURM_STEP_ID" in environment:
        # the shell of salloc may be a step of one task, in a job of several
        tasks = int(environment.get("SLURM_STEP_NUM_TASKS", tasks))
        launchers = int(environment.get("GROUP_WORLD_SIZE", tasks))  # elastic agents that have met
        if world % tasks != 0:
            problem = (
                f"srun started {tasks} tasks but WORLD_SIZE={world}: each task would train alone"
            )
        elif launchers % tasks != 0:
            problem = (
                f"srun started {tasks} tasks, each with a launcher of its own (GROUP_WORLD_SIZE="
                f"{launchers}): each task would train alone"
            )
    elif environment.get("ENVIRONMENT") == "BATCH" and world == 1 < tasks:  # as slurmd sets it
        problem = (
            f"the job has SLURM_NTASKS={tasks} tasks but its script starts one process, without "
            "srun and without a launcher"
        )
    if not problem:
        return None
    return (
        f"{problem}. Start with `sbatch launch/slurm.sbatch ...`, or set EXPECTED_WORLD_SIZE="
        f"{world} if a run of that many processes is meant"
    )


def resolve_precision(config: TrainConfig, *, has_accelerator: bool, has_bf16: bool) -> TrainConfig:
    """A copy in which training.precision has a concrete value, which these machines can train in.

    `has_bf16`: every rank's device computes in bfloat16 rather than emulating it.
    """
    resolved = copy.deepcopy(config)
    training = resolved.training
    if training.precision == "auto":
        training.precision = "bf16" if has_bf16 else "no"
    elif training.precision == "fp16" and not has_accelerator:
        raise ConfigError(
            "training.precision=fp16 needs an accelerator, and there is none; use bf16 or no"
        )
    return resolved


def resolve(config: TrainConfig, *, mean_sample_bytes: float) -> TrainConfig:
    """A copy in which data.slots and data.window have concrete values.

    `mean_sample_bytes` comes from the index of the training shards: so slots and window are
    properties of config and data.
    """
    resolved = copy.deepcopy(config)
    data = resolved.data
    data.slots = slots_of(resolved)
    if data.window == "auto":
        data.window = _automatic_window(resolved, mean_sample_bytes)
    return resolved


def _automatic_window(config: TrainConfig, mean_sample_bytes: float) -> int:
    # Twice: a lane reads its next window while the present one is being used up. A lane holds one
    # sample of a step, or with aspect buckets one slot of it.
    row_bytes = 2 * config.training.batch_size * mean_sample_bytes
    smallest = MIN_SLOTS_OF_WINDOW if has_buckets(config) else 1
    window = MAX_AUTOMATIC_WINDOW
    while window > smallest and window * row_bytes > config.data.window_bytes:
        window //= 2
    if window * row_bytes > config.data.window_bytes:
        what = f"{2 * smallest} slots" if has_buckets(config) else "two samples"
        raise ConfigError(
            f"data.window_bytes={config.data.window_bytes} holds less than {what} of each "
            f"lane; data.window=auto needs at least {math.ceil(smallest * row_bytes)}"
        )
    per_slot = config.training.batch_size // config.data.slots
    return window * per_slot if has_buckets(config) else window
