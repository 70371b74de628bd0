"""Ranks of one training that can be signalled, killed and looked at while they run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.distributed import FORK, become_rank, free_port
from vae_dist.train import main as train
from vae_dist.training import setup  # imported before any fork

assert setup  # what the command would import in each process
SESSION_LIMIT_S = 600.0
Prepare = Callable[[int], None]  # called with its rank in each process, before the command


class Ranks:
    """Processes of one training, each of a group of its own; none of them outlives the context."""

    def __init__(self, world: int, argv: list[str], output: Path, prepare: Prepare) -> None:
        port = free_port()
        output.mkdir(parents=True, exist_ok=True)
        self.output = [output / f"rank{rank}.log" for rank in range(world)]
        self._processes = [
            FORK.Process(target=_rank, args=(rank, world, port, log, argv, prepare))
            for rank, log in enumerate(self.output)
        ]
        for process in self._processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        """To these ranks alone; none given: to all."""
        for rank in ranks or range(len(self._processes)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def wait(self) -> list[int | None]:
        """Exit codes; None for one that still runs after the limit."""
        end = time.monotonic() + SESSION_LIMIT_S
        for process in self._processes:
            process.join(max(0, end - time.monotonic()))
        return [process.exitcode for process in self._processes]

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Or until a rank has ended."""
        end = time.monotonic() + SESSION_LIMIT_S
        while not is_so() and all(process.is_alive() for process in self._processes):
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)

    def text(self) -> str:
        return "\n".join(log.read_text() for log in self.output if log.exists())

    def orphans(self) -> list[int]:
        """Groups of ended ranks of which a process still lives after a while."""
        end, left = time.monotonic() + 20, self.pids
        while left and time.monotonic() < end:
            time.sleep(0.02)
            left = [group for group in left if _has_members(group)]
        return left


def _has_members(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def _rank(rank: int, world: int, port: int, log: Path, argv: list[str], prepare: Prepare) -> None:
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    become_rank(rank, world, port)
    prepare(rank)
    code = train(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
