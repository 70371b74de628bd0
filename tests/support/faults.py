"""Faults from outside: ranks of the real `train` command that can be killed, signalled and frozen.

Nothing inside the package knows of this: what happens at a chosen point is wrapped around its
functions in the forked process.
"""

import os
import signal
import sys

from tests.support.distributed import fork_ranks
from vae_dist.run import checkpoint
from vae_dist.train import main
from vae_dist.training import setup  # imported before any fork
from vae_dist.training.stop import RankWatch

assert setup  # what the command would import in each process


def run_command(world, argv, *, prepare=lambda rank: None, but=None):
    """Exit codes of the ranks of one training, but of one that is not waited for. `prepare` is
    called with its rank in each of them before the command."""
    return fork_ranks(world, _command, argv, prepare, but=but, timeout_s=120)


def _command(rank, argv, prepare):
    prepare(rank)
    code = main(argv)
    sys.stdout.flush()
    os._exit(code)


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
