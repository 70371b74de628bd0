"""Train a VAE: `accelerate launch -m vae_dist.train config=mnist [key=value ...]`.

The same command goes on where the run stands; a finished run says so. Exit codes: 0 finished, 75
interrupted (run the same command again), 2 wrong config or data, 1 failed.
"""

from __future__ import annotations

import os
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path

from vae_dist.cli import exit_process, print_error, set_environment
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import help_text, wants_help
from vae_dist.config.resolve import world_size_problem
from vae_dist.config.schema import TrainConfig
from vae_dist.training.stop import StopSignals

USAGE = "accelerate launch -m vae_dist.train config=NAME|PATH [key=value ...]"
INTRO = "Train a VAE on shards. Give the same command again to go on where the run stands."
REFUSAL_PAUSE_S = 3.0  # for the rank that prints the reason


def checked_config(argv: list[str]) -> TrainConfig:
    """The config, if it is right and these processes can train it; imports no torch.

    Raises ConfigError. launch/slurm.sbatch calls this before it starts the trainer.
    """
    if problem := launch_problem(os.environ):
        raise ConfigError(problem)
    from vae_dist.config.load import load_train_config

    config = load_train_config(argv)
    if problem := world_size_problem(config, int(os.environ.get("WORLD_SIZE", "1"))):
        raise ConfigError(problem)
    return config


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


def main(argv: list[str] | None = None) -> int:
    set_environment()
    argv = sys.argv[1:] if argv is None else argv
    if wants_help(argv):
        print(help_text(TrainConfig, usage=USAGE, intro=INTRO))
        return 0
    try:
        config = checked_config(argv)
    except ConfigError as error:  # before the ranks have met: a file may be missing on one node
        return _refused(error, speaker="LOCAL_RANK")
    try:
        with StopSignals() as signals:
            _say_what_takes_time(config)
            from vae_dist.training.setup import run_session  # torch, once the config is right

            return run_session(config, signals)
    except ConfigError as error:  # the same on all ranks
        return _refused(error, speaker="RANK")


class _Callable(types.ModuleType):
    """This module is also a function of the Python API: `vae_dist.train(config)`."""

    def __call__(self, config: TrainConfig) -> Path:
        """Train in this process; returns the path of the run folder.

        As on the command line, a run that was interrupted goes on where it stands, and a finished
        one is left as it is. SIGINT and SIGTERM save a checkpoint and end the run.

        Args:
            config: from `vae_dist.config`; it is not changed.

        Raises:
            ConfigError: config, data or run folder cannot be used.
            RuntimeError: training failed or was interrupted; the run folder has what was saved.

        Example:
            >>> folder = vae_dist.train(vae_dist.config("config=debug"))
            >>> vae = vae_dist.load(folder)
        """
        code = _trained_here(config)
        if code:
            ending = "was interrupted; the same call goes on" if code == 75 else "failed"
            raise RuntimeError(f"run={config.run}: training {ending}")
        return Path(config.run)


def _trained_here(config: TrainConfig) -> int:
    """The exit code of a session; threads, TensorFloat-32 and Accelerate are as before it."""
    import copy

    import torch
    from accelerate.state import AcceleratorState, GradientState

    from vae_dist.training.compile import exact_float32
    from vae_dist.training.setup import run_session

    threads = torch.get_num_threads()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with exact_float32(device), StopSignals() as signals:
            return run_session(copy.deepcopy(config), signals)
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


sys.modules[__name__].__class__ = _Callable


def _say_what_takes_time(config: TrainConfig) -> None:
    """Tell the main process' reader that the command is at work: imports take seconds, on a slow
    file system half a minute. On stderr, so that stdout holds the plan and the log alone."""
    if os.environ.get("RANK", "0") == "0" and "torch" not in sys.modules:
        print(f"config {config.config}: loading torch ...", file=sys.stderr, flush=True)


def _refused(error: ConfigError, *, speaker: str) -> int:
    if os.environ.get(speaker, "0") == "0":
        print_error(error)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(REFUSAL_PAUSE_S)  # the launcher ends the other ranks once one has ended
    return 2


if __name__ == "__main__":
    exit_process(main())
