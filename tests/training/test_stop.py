"""Requests to stop, counted in processes of their own: the second one ends the process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vae_dist.config.launcher import LAUNCHER_VARIABLES
from vae_dist.training.stop import SIGNALS, StopSignals

# prints the reason once there is one; "blocked" waits in C, where no handler of Python's runs
CHILD = """
import sys, time, ctypes
from vae_dist.training import stop
stop.BURST_S = 0.2
with stop.StopSignals() as stop:
    print("ready", flush=True)
    if "blocked" in sys.argv:
        condition, mutex = (ctypes.create_string_buffer(64) for _ in range(2))
        ctypes.CDLL(None).pthread_cond_wait(condition, mutex)
    end = time.monotonic() + 20
    while time.monotonic() < end and not (stop.reason and "wait" not in sys.argv):
        time.sleep(0.01)
    print(stop.reason, flush=True)
"""


def child(*words):
    command = [sys.executable, "-c", CHILD, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_sets_a_reason_and_handlers_are_put_back(number):
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.reason == f"signal {number.name}"
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGHUP, ""),  # nohup
        # `trap "" USR1` of launch/sweep.sbatch is inherited by the trainer
        (signal.SIGUSR1, "signal SIGUSR1"),
    ],
)
def test_what_is_ignored_at_the_start_is_heard_unless_it_is_of_a_closed_terminal(number, reason):
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), number)
            assert stop.reason == reason
    finally:
        signal.signal(number, previous)


@pytest.mark.parametrize("mode", ["wait", "blocked"])
def test_one_request_may_come_several_times_and_a_second_one_ends_the_process(mode):
    """At once, wherever it is."""
    process = child(mode)
    for _ in range(4):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.005)
    time.sleep(0.4)  # past the burst
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    process.communicate()


@pytest.mark.parametrize(
    ("variable", "name", "reason"),
    [
        ("TORCHELASTIC_RUN_ID", "agent", "the launcher, process {pid}, is gone"),
        ("ACCELERATE_MIXED_PRECISION", "bash", "the launcher, process {pid}, is gone"),
        ("NOTHING", "shell", "signal SIGTERM"),  # a run under nohup outlives its shell
    ],
)
def test_a_launcher_that_is_gone_is_a_request(variable, name, reason):
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    command = ["bash", "-c", '"$@" & echo $!; wait', name, sys.executable, "-c", CHILD]
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
