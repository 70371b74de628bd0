"""What all command lines share: the environment that libraries read, and how a process ends."""

import importlib
import os
import subprocess
import sys

import vae_dist
from vae_dist.sample import main as sample
from vae_dist.train import main as train

ENDING = """
import atexit
from vae_dist.cli import exit_process

class Held:
    def __del__(self):
        print("taken apart")

held = Held()
atexit.register(print, "atexit")
exit_process(75)
"""


def run(code, **variables):
    command, environment = [sys.executable, "-c", code], {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_end_of_a_process():
    """Exit code and output arrive; one rank of several skips the interpreter's shutdown."""
    for world, said in (("1", "atexit\ntaken apart\n"), ("2", "atexit\n")):
        ended = run(ENDING, WORLD_SIZE=world)
        assert (ended.returncode, ended.stdout, ended.stderr) == (75, said, "")


def test_waiting_threads_sleep_unless_the_environment_says_otherwise(monkeypatch):
    for given, expected in ((None, "1000"), ("GOMP_SPINCOUNT", "9"), ("OMP_WAIT_POLICY", None)):
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        if given:
            monkeypatch.setenv(given, "9")
        importlib.reload(vae_dist)
        assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_errors_are_printed_a_line_each_without_secrets(capsys):
    assert sample(["run=a", "seed=https://me:pw@host/x"]) == sample(["run=a\nb\x1b[2J"]) == 2
    secret, controls = capsys.readouterr().err.splitlines()
    assert secret == "seed=https://...@host/x is not a whole number"
    assert controls.startswith(r"run=a\nb\x1b[2J: no run folder")


def test_a_rank_that_is_left_over_silences_nothing(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for main, key in ((train, "config=nope"), (sample, "run=nope")):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert main([key]) == 2 and key in capsys.readouterr().err


def test_what_a_terminal_cannot_show_is_escaped():
    ended = run("from vae_dist.train import main; main(['config=ü'])", PYTHONIOENCODING="ascii")
    assert "config=\\xfc" in ended.stderr and "Traceback" not in ended.stderr
