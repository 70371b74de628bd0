"""Requests to stop: signals, and a launcher that is gone."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vae_dist.config.launcher import LAUNCHER_VARIABLES
from vae_dist.training.stop import SIGNALS, StopSignals

# prints the reason once there is one
CHILD = """
import time
from vae_dist.training.stop import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    end = time.monotonic() + 20
    while time.monotonic() < end and not stop.reason:
        time.sleep(0.01)
    print(stop.reason, flush=True)
"""


@pytest.mark.parametrize(
    ("number", "is_ignored", "is_heard"),
    [
        *((number, False, True) for number in SIGNALS),
        (signal.SIGHUP, True, False),  # nohup
        (signal.SIGUSR1, True, True),  # `trap "" USR1` of launch/sweep.sbatch is inherited
    ],
)
def test_the_first_signal_sets_a_reason_and_handlers_are_put_back(number, is_ignored, is_heard):
    previous = signal.getsignal(number)
    if is_ignored:
        signal.signal(number, signal.SIG_IGN)
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert signals.reason == (f"signal {number.name}" if is_heard else "")
    assert [signal.getsignal(one) for one in SIGNALS] == before
    signal.signal(number, previous)


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        ("TORCHELASTIC_RUN_ID", "the launcher, process {pid}, is gone"),
        ("ACCELERATE_MIXED_PRECISION", "the launcher, process {pid}, is gone"),
        ("NOTHING", "signal SIGTERM"),  # a run under nohup outlives its shell
    ],
)
def test_a_launcher_that_is_gone_is_a_request(variable, reason):
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    command = ["bash", "-c", '"$@" & echo $!; wait', "shell", sys.executable, "-c", CHILD]
    environment[variable] = "no"
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    child_pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    if variable == "NOTHING":
        time.sleep(0.05)
        os.kill(child_pid, signal.SIGTERM)
    assert parent.communicate(timeout=20)[0] == reason.format(pid=parent.pid) + "\n"
