"""What all command lines share: the environment that libraries read, and how a process ends."""

import os
import subprocess
import sys

import pytest

from vae_dist.cli import set_environment

ENDING = """
import atexit, sys
from vae_dist.cli import exit_process

class Held:
    def __del__(self):
        print("taken apart", flush=True)

held = Held()
atexit.register(print, "atexit")
print("said")
exit_process(75)
"""


@pytest.mark.parametrize(
    ("world", "said"),
    [("1", ["said", "atexit", "taken apart"]), ("2", ["said", "atexit"])],
)
def test_the_end_of_a_process(world, said):
    """Exit code and output arrive; one rank of several skips the interpreter's shutdown."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDING],
        env={**os.environ, "WORLD_SIZE": world},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 75
    assert ended.stdout.splitlines() == said
    assert not ended.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "infinity"}, "infinity"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_waiting_threads_sleep_unless_the_environment_says_otherwise(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    set_environment()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_the_environment_is_set_before_torch_is_loaded():
    code = (
        "import os, sys\n"
        "os.environ.pop('GOMP_SPINCOUNT', None)\n"
        "from vae_dist.train import main\n"
        "assert main(['config=debug', 'no.such=key']) == 2\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ['GOMP_SPINCOUNT'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1000"], done.stderr
