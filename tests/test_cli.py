"""What all command lines share: the environment that libraries read, and how a process ends."""

import importlib
import os
import subprocess
import sys

import pytest

import vae_dist
from vae_dist.sample import main as sample
from vae_dist.train import main as train

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
    ("world", "said"), [("1", "said atexit taken apart"), ("2", "said atexit")]
)
def test_the_end_of_a_process(world, said):
    """Exit code and output arrive; one rank of several skips the interpreter's shutdown."""
    environment = {**os.environ, "WORLD_SIZE": world}
    command = [sys.executable, "-c", ENDING]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, " ".join(ended.stdout.split()), ended.stderr) == (75, said, "")


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
        if name in given:
            monkeypatch.setenv(name, given[name])
    importlib.reload(vae_dist)
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_errors_are_printed_a_line_each_without_secrets(capsys):
    assert sample(["run=a\nb\x1b[2J", "seed=https://me:pw@host/x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["seed=https://...@host/x is not a whole number"]
    assert sample(["run=a\nb\x1b[2J"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(r"run=a\nb\x1b[2J: no run folder")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_a_rank_that_is_left_over_silences_nothing(monkeypatch, capsys, name):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for main, key in ((train, "config=nope"), (sample, "run=nope")):
        monkeypatch.setenv(name, "1")
        assert main([key]) == 2 and key in capsys.readouterr().err


def test_what_a_terminal_cannot_show_is_escaped():
    code = "from vae_dist.train import main; main(['config=ü'])"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert b"config=\\xfc" in done.stderr and b"Traceback" not in done.stderr
