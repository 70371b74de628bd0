"""How the threads of one operation wait for each other. Imports nothing: torch must come later."""

import os

SPIN_COUNT = 1000  # what GNU OpenMP itself takes where it knows that cores are shared


def share_cores() -> None:
    """Let threads sleep after a moment of waiting; before torch is imported.

    GNU OpenMP has them turn in a loop 300,000 times first. Where another program uses one of the
    cores, its share of time passes with that: `mnist` on two threads then takes 20 times as long
    (benchmarks/RESULTS.md). A number of turns or a policy that the environment has stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
