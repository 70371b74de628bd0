"""Run a function on N ranks: forked processes, gloo, rendezvous through a file.

`torch._dynamo` is imported in the parent before the fork: the wrapped optimizers of torch import it
at their first use, which costs seconds in each child.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist

LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ACCELERATE_MIXED_PRECISION",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60
) -> list[Any]:
    """`function(*args)` on `world` ranks, which find each other as under a launcher; their results.

    The function makes its own Runtime (or Accelerator). Raises with the first rank's traceback.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            context.Process(
                target=_rank_main, args=(rank, world, port, Path(folder), timeout_s, function, args)
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout_s + 10)
            if process.is_alive():
                process.kill()
                process.join()
        outcomes = [_outcome(Path(folder) / str(rank), rank) for rank in range(world)]
    failures = [text for ok, text in outcomes if not ok]
    if failures:
        raise AssertionError("\n".join(failures))
    return [result for _, result in outcomes]


def _outcome(path: Path, rank: int) -> tuple[bool, Any]:
    if not path.exists():
        return False, f"rank {rank} ended without a result (killed, or timed out)"
    outcome: tuple[bool, Any] = pickle.loads(path.read_bytes())
    return outcome


def _rank_main(
    rank: int,
    world: int,
    port: int,
    folder: Path,
    timeout_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    faulthandler.enable()
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    become_rank(rank, world, port)
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, f"rank {rank}:\n{traceback.format_exc()}")
    target = folder / f"{rank}.tmp"
    target.write_bytes(pickle.dumps(outcome))
    target.rename(folder / str(rank))
    sys.stdout.flush()
    sys.stderr.flush()
    if outcome[0] and dist.is_initialized():
        dist.barrier()
    os._exit(0)  # a live DDP model can hang destroy_process_group


def become_rank(rank: int, world: int, port: int) -> None:
    """Make this forked process what a launcher would have started: one thread, its environment."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    reset_accelerate()


def reset_accelerate() -> None:
    """Accelerate's state is a singleton that a forked child inherits."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
