"""Run a function on N ranks: forked processes, gloo, rendezvous through a port.

`torch._dynamo` is imported in the parent before the fork: the wrapped optimizers of torch import it
at their first use, which costs seconds in each child.
"""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist

FORK = multiprocessing.get_context("fork")
LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "ACCELERATE_MIXED_PRECISION",
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(world, function, *args, timeout_s=60):
    """`function(*args)` on `world` ranks, which find each other as under a launcher; their results.

    The function makes its own Runtime (or Accelerator). Raises with the first rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(rank) for rank in range(world)]
        fork_ranks(world, _rank, paths, timeout_s, function, args, timeout_s=timeout_s + 10)
        outcomes = [pickle.loads(path.read_bytes()) for path in paths if path.exists()]
    failures = [text for is_good, text in outcomes if not is_good]
    failures += ["a rank ended without a result (killed, or timed out)"] * (world - len(outcomes))
    if failures:
        raise AssertionError("\n".join(failures))
    return [result for _, result in outcomes]


def fork_ranks(world, function, *args, but=None, timeout_s):
    """Exit codes of `function(rank, *args)` on `world` ranks, None for one that still runs after
    the timeout. `but`: the rank that is not waited for. None of them lives on."""
    port = free_port()
    processes = [
        FORK.Process(target=_become, args=(rank, world, port, function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout_s
    for rank, process in enumerate(processes):
        if rank != but:
            process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _become(rank, world, port, function, args):
    become_rank(rank, world, port)
    function(rank, *args)


def _rank(rank, paths, timeout_s, function, args):
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    path = paths[rank]
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, f"rank {rank}:\n{traceback.format_exc()}")
    path.with_suffix(".tmp").write_bytes(pickle.dumps(outcome))
    path.with_suffix(".tmp").rename(path)
    sys.stdout.flush()
    sys.stderr.flush()
    if outcome[0] and dist.is_initialized():
        dist.barrier()
    os._exit(0)  # a live DDP model can hang destroy_process_group


def become_rank(rank, world, port):
    """Make this forked process what a launcher would have started: one thread, its environment."""
    torch.set_num_threads(1)
    values = (rank, rank, world, world, "127.0.0.1", port)
    os.environ.update({k: str(v) for k, v in zip(LAUNCHER_VARIABLES, values, strict=False)})
    reset_accelerate()


def reset_accelerate():
    """Accelerate's state is a singleton that a forked child inherits."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
