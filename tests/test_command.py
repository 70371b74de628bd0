"""How a command ends: with its exit code and all that it has said, and, as one rank of several,
without taking the interpreter apart."""

import os
import subprocess
import sys

import pytest

ENDING = """
import atexit, sys
from vae_dist.command import leave

class Held:
    def __del__(self):
        print("taken apart", flush=True)

held = Held()
atexit.register(print, "atexit")
print("said")
leave(75)
"""


@pytest.mark.parametrize(
    ("world", "said"),
    [("1", ["said", "atexit", "taken apart"]), ("2", ["said", "atexit"])],
)
def test_the_end_of_a_process(world, said):
    ended = subprocess.run(
        [sys.executable, "-c", ENDING],
        env={**os.environ, "WORLD_SIZE": world},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 75
    assert ended.stdout.splitlines() == said
    assert not ended.stderr
