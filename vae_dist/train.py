"""Train a VAE: `accelerate launch -m vae_dist.train config=mnist [key=value ...]`.

The same command goes on where the run stands; a finished run says so. Exit codes: 0 finished, 75
interrupted (run the same command again), 2 wrong config or data, 1 failed.
"""

from __future__ import annotations

import copy
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
from vae_dist.files import printable
from vae_dist.training.stop import EXIT_INTERRUPTED, StopSignals

USAGE = "accelerate launch -m vae_dist.train config=NAME|PATH [key=value ...]"
INTRO = "Train a VAE on shards. Give the same command again to go on where the run stands."
REFUSAL_PAUSE_S = 3.0  # for the rank that prints the reason


def checked_config(argv: list[str]) -> TrainConfig:
    """The config, if it is right and these processes can train it; imports no torch.

    Raises ConfigError. launch/slurm.sbatch calls this before it starts the trainer.
    """
    if broken_promise := launch_problem(os.environ):
        raise ConfigError(broken_promise)
    from vae_dist.config.load import load_train_config  # --help does without OmegaConf

    config = load_train_config(argv)
    if problem := world_size_problem(config, int(os.environ.get("WORLD_SIZE", "1"))):
        raise ConfigError(problem)
    return config


def launch_problem(environment: Mapping[str, str]) -> str:
    """Why these processes are not those that the launcher promised, empty when they are.

    A promise is EXPECTED_WORLD_SIZE, which a launch script sets, or the tasks of a SLURM job: in a
    step of srun each task starts at least one process, and all of them are of one run. A batch
    script with several tasks is not meant for one process; a shell of salloc may be.
    """
    world = int(environment.get("WORLD_SIZE", "1"))
    if expected := int(environment.get("EXPECTED_WORLD_SIZE") or "0"):
        promised = f"EXPECTED_WORLD_SIZE={expected} processes were promised"
        is_kept = world == expected
    else:
        tasks = int(environment.get("SLURM_NTASKS", "1"))
        promised = f"SLURM has started {tasks} tasks"
        is_kept = world > 1 or environment.get("ENVIRONMENT") != "BATCH"  # as slurmd sets it
        if "SLURM_STEP_ID" in environment:
            # the shell of salloc may be a step of one task, in a job of several
            tasks = int(environment.get("SLURM_STEP_NUM_TASKS", tasks))
            launchers = int(environment.get("GROUP_WORLD_SIZE", tasks))  # that have met
            is_kept = world % tasks == 0 == launchers % tasks
        is_kept = is_kept or tasks == 1
    if is_kept:
        return ""
    return (
        f"{promised} but WORLD_SIZE={world}: each task would train alone. Start with `sbatch "
        "launch/slurm.sbatch ...` or `accelerate launch --multi_gpu --num_processes N`; if a run "
        f"of {world} is meant, set EXPECTED_WORLD_SIZE={world}"
    )


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
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
            if os.environ.get("RANK", "0") == "0" and "torch" not in sys.modules:
                # seconds, on a slow file system half a minute; stdout holds plan and log alone
                print(printable(f"config {config.config}: loading torch ..."), file=sys.stderr)
            from vae_dist.training.setup import run_session  # torch, once the config is right

            return run_session(config, signals)
    except ConfigError as error:  # the same on all ranks
        return _refused(error, speaker="RANK")


def _refused(error: ConfigError, *, speaker: str) -> int:
    if os.environ.get(speaker, "0") == "0":
        print_error(error)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(REFUSAL_PAUSE_S)  # the launcher ends the other ranks once one has ended
    return 2


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
        import torch
        from accelerate.state import AcceleratorState, GradientState

        from vae_dist.training.compile import exact_float32
        from vae_dist.training.setup import run_session

        threads = torch.get_num_threads()
        try:
            with exact_float32(), StopSignals() as signals:
                code = run_session(copy.deepcopy(config), signals)
        finally:  # threads, TensorFloat-32 and Accelerate are as before
            torch.set_num_threads(threads)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        if code:
            was_stopped = code == EXIT_INTERRUPTED
            ending = "was interrupted; the same call goes on" if was_stopped else "failed"
            raise RuntimeError(f"run={config.run}: training {ending}")
        return Path(config.run)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    exit_process(main())
