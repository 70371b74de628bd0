"""What all command lines share: the environment that libraries read, and how a process ends."""

import os
import subprocess
import sys

import pytest

from vae_dist.cli import set_environment
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


@pytest.mark.parametrize("argument", ["--help", "no.such=key"])
def test_help_and_refusals_load_no_torch_and_the_environment_is_set_before(argument):
    code = (
        "import os, sys\n"
        "os.environ.pop('GOMP_SPINCOUNT', None)\n"
        "from vae_dist.train import main\n"
        "main(['config=debug', sys.argv[1]])\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ['GOMP_SPINCOUNT'])"
    )
    done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "1000", done.stderr


def test_errors_are_printed_a_line_each_without_secrets(capsys):
    assert sample(["run=a\nb\x1b[2J", "seed=https://me:pw@host/x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["seed=https://...@host/x is not a whole number"]
    assert sample(["run=a\nb\x1b[2J"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(r"run=a\nb\x1b[2J: no run folder")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_a_rank_that_is_left_over_silences_nothing(monkeypatch, capsys, name):
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.delenv("WORLD_SIZE")
    assert train(["config=nope"]) == 2 and "config=nope" in capsys.readouterr().err
    monkeypatch.setenv(name, "1")
    assert sample(["run=nope"]) == 2 and "run=nope" in capsys.readouterr().err


def test_what_a_terminal_cannot_show_is_escaped():
    code = "from vae_dist.train import main; main(['config=ü'])"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert b"config=\\xfc" in done.stderr and b"Traceback" not in done.stderr
