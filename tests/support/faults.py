"""Faults from outside: ranks of the real `train` command that can be killed, signalled and frozen.

The ranks are forked from a parent that has imported everything, so that one starts in a moment.
Nothing inside the package knows of this: what happens at a chosen point is wrapped around its
functions in the forked process.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import time

from tests.support.distributed import FORK, become_rank, free_port
from vae_dist.run import checkpoint
from vae_dist.tracking.sinks import read_rows
from vae_dist.train import main
from vae_dist.training import setup  # imported before any fork
from vae_dist.training.stop import RankWatch

assert setup  # what the command would import in each process


class Ranks:
    """`world` processes of one training; use as a context manager, which leaves none behind.
    `prepare` is called with its rank in each of them before the command."""

    def __init__(self, world, argv, *, output, prepare=lambda rank: None):
        port = free_port()
        output.mkdir(parents=True, exist_ok=True)
        self.output = [output / f"rank{rank}.log" for rank in range(world)]
        self._processes = [
            FORK.Process(target=_rank, args=(rank, world, port, log, argv, prepare))
            for rank, log in enumerate(self.output)
        ]
        for process in self._processes:
            process.start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self._processes:
            process.kill()
            process.join()

    @property
    def pids(self):
        return [process.pid for process in self._processes]

    def signal(self, number, *ranks):
        """To these ranks alone; none given: to all."""
        for rank in ranks or range(len(self._processes)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def wait(self, *ranks, timeout_s=60):
        """Exit codes of these ranks, or of all; None for one that still runs after the timeout."""
        end = time.monotonic() + timeout_s
        chosen = [self._processes[rank] for rank in ranks or range(len(self._processes))]
        for process in chosen:
            process.join(max(0, end - time.monotonic()))
        return [process.exitcode for process in chosen]

    def wait_until(self, is_so, *, timeout_s=60):
        """Or until a rank has ended."""
        end = time.monotonic() + timeout_s
        while not is_so() and all(p.is_alive() for p in self._processes):
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)

    def text(self):
        return "\n".join(log.read_text() for log in self.output if log.exists())

    def orphans(self, *, timeout_s=20):
        """Ended ranks of which a process that they started lives: they are of one group."""
        end = time.monotonic() + timeout_s
        left = [process.pid for process in self._processes if not process.is_alive()]
        while left and time.monotonic() < end:
            time.sleep(0.02)
            left = [group for group in left if _has_members(group)]
        return left


def _has_members(group):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def last_step(run):
    """Step of the last row of the log; -1 when there is none."""
    return max((step for step, _ in read_rows(run / "log.jsonl")), default=-1)


# faults at a chosen point, from inside a rank


def at_place(place, action, *, ranks=(0,), visit=1):
    """These ranks do something when they come to a place for the nth time.

    The places are those of `training.loop`: of start-up ("shards", ...) and of a step.
    """

    def prepare(rank):
        at, visits = RankWatch.at, 0

        def visited(self, step, phase, shape=None):
            nonlocal visits
            at(self, step, phase, shape)
            visits += phase == place
            if phase == place and visits == visit and rank in ranks:
                action()

        RankWatch.at = visited

    return prepare


def in_the_middle_of_a_write(action, *, after_step):
    """Done on the main process, in the thread that writes a checkpoint beyond this step, with one
    of its files on the disk."""

    def prepare(rank):
        write = checkpoint.write_durably
        is_done = False

        def interrupted(path, data):
            nonlocal is_done
            write(path, data)
            step = path.parent.name.removeprefix(".step_").removesuffix(".tmp")
            if not is_done and step.isdigit() and int(step) > after_step:
                is_done = True
                action()

        checkpoint.write_durably = interrupted

    return prepare


def signal_oneself(number=signal.SIGTERM):
    """As from outside: to the process, whichever thread it is in."""
    os.kill(os.getpid(), number)


def _rank(rank, world, port, log, argv, prepare):
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115  (pytest has its own)
    faulthandler.enable()
    become_rank(rank, world, port)
    code = 1
    try:
        prepare(rank)
        code = main(argv)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
