"""Faults from outside: ranks of the real `train` command that can be killed, signalled and frozen.

The ranks are forked from a parent that has imported everything, so that one starts in a moment.
Nothing inside the package knows of this: what happens at a chosen point is wrapped around its
functions in the forked process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import psutil

from tests.support.distributed import become_rank, free_port
from tests.support.training import status
from vae_dist.run import checkpoint
from vae_dist.train import main
from vae_dist.training import setup  # imported before any fork
from vae_dist.training.watch import RankWatch

assert setup  # what the command would import in each process


class Ranks:
    """`world` processes of one training; use as a context manager, which leaves none behind.

    `prepare` is called in each process before the command: the place for monkeypatches.
    """

    def __init__(
        self,
        world: int,
        argv: list[str],
        *,
        output: Path,
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("fork")
        port = free_port()
        output.mkdir(parents=True, exist_ok=True)
        self.run = Path(next(word[4:] for word in argv if word.startswith("run=")))
        self.output = [output / f"rank{rank}.log" for rank in range(world)]
        self._processes = [
            context.Process(target=_rank, args=(rank, world, port, log, argv, prepare))
            for rank, log in enumerate(self.output)
        ]
        self._family: set[psutil.Process] = set()
        for process in self._processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        """To these ranks alone; none given: to all."""
        self._note_family()
        for rank in ranks or range(len(self._processes)):
            pid = self._processes[rank].pid
            assert pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, *ranks: int, timeout_s: float = 60) -> list[int | None]:
        """Exit codes of these ranks, or of all; None for one that still runs after the timeout."""
        end = time.monotonic() + timeout_s
        chosen = [self._processes[rank] for rank in ranks or range(len(self._processes))]
        while any(p.is_alive() for p in chosen) and time.monotonic() < end:
            self._note_family()
            time.sleep(0.02)
        return [process.exitcode for process in chosen]

    def wait_for_step(self, step: int, *, timeout_s: float = 60) -> None:
        """Until the log has a row of that step or a later one, or a rank has ended."""
        end = time.monotonic() + timeout_s
        while last_step(self.run) < step and all(p.is_alive() for p in self._processes):
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)

    def text(self) -> str:
        return "\n".join(log.read_text() for log in self.output if log.exists())

    def orphans(self, *, timeout_s: float = 20) -> list[psutil.Process]:
        """Processes that the ranks started and that outlive them."""
        end = time.monotonic() + timeout_s
        while (left := [p for p in self._family if p.is_running()]) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    def _note_family(self) -> None:
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                self._family.update(psutil.Process(process.pid).children(recursive=True))


def last_step(run: Path) -> int:
    """Step of the last whole row of the log; -1 when there is none."""
    try:
        with open(run / "log.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            rows = [row for row in file.read().split(b"\n")[:-1] if row.startswith(b'{"step": ')]
    except OSError:
        return -1
    return int(rows[-1][9:].split(b",", 1)[0].rstrip(b"}")) if rows else -1


def is_running(run: Path) -> bool:
    return (run / "status.json").exists() and status(run)["status"] == "running"


# faults at a chosen point, from inside a rank


def at_place(
    place: str, action: Callable[[], object], *, ranks: tuple[int, ...], visit: int = 1
) -> Callable[[int], None]:
    """For `prepare`: these ranks do something when they come to a place for the nth time.

    The places are those of `training.loop`: of start-up ("shards", ...) and of a step.
    """

    def prepare(rank: int) -> None:
        at, visits = RankWatch.at, 0

        def visited(self: RankWatch, step: int, phase: str, shape: Hashable = None) -> None:
            nonlocal visits
            at(self, step, phase, shape)
            visits += phase == place
            if phase == place and visits == visit and rank in ranks:
                action()

        RankWatch.at = visited  # type: ignore[method-assign]

    return prepare


def in_the_middle_of_a_write(
    action: Callable[[], object], *, after_step: int
) -> Callable[[int], None]:
    """For `prepare`: done on the main process, in the thread that writes a checkpoint beyond this
    step, with one of its files on the disk."""

    def prepare(rank: int) -> None:
        write = checkpoint.write_durably
        is_done = False

        def interrupted(path: Path, data: Any) -> None:
            nonlocal is_done
            write(path, data)
            step = path.parent.name.removeprefix(".step_").removesuffix(".tmp")
            if not is_done and step.isdigit() and int(step) > after_step:
                is_done = True
                action()

        checkpoint.write_durably = interrupted

    return prepare


def signal_oneself(number: signal.Signals = signal.SIGTERM) -> None:
    """As from outside: to the process, whichever thread it is in."""
    os.kill(os.getpid(), number)


def starve(until: Path) -> None:
    """The loader delivers nothing until the file is there."""
    while not until.exists():
        time.sleep(0.01)


def _rank(
    rank: int,
    world: int,
    port: int,
    log: Path,
    argv: list[str],
    prepare: Callable[[int], None] | None,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115  (pytest has its own)
    faulthandler.enable()
    become_rank(rank, world, port)
    code = 1
    try:
        if prepare is not None:
            prepare(rank)
        code = main(argv)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
