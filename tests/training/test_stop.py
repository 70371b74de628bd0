"""Requests to stop, counted in processes of their own: the second one ends the process."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from vae_dist.config.launcher import LAUNCHER_VARIABLES
from vae_dist.training.stop import SIGNALS, StopSignals

# prints the reason every 10 ms; BLOCKED waits in C, where no handler of Python's runs
CHILD = """
import sys, time, ctypes
from vae_dist.training import stop
stop.BURST_S = 0.4
with stop.StopSignals() as stop:
    print("ready", flush=True)
    if "blocked" in sys.argv:
        condition, mutex = (ctypes.create_string_buffer(64) for _ in range(2))
        ctypes.CDLL(None).pthread_cond_wait(condition, mutex)
    end = time.monotonic() + 5
    while time.monotonic() < end and not (stop.reason and "wait" not in sys.argv):
        time.sleep(0.01)
    print(stop.reason, flush=True)
"""


def child(*words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_sets_a_reason(number):
    process = child()
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == f"signal {number.name}\n"
    assert process.returncode == 0


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


def test_one_request_may_be_delivered_several_times():
    process = child()
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    assert process.communicate(timeout=20)[0] == "signal SIGTERM\n"


@pytest.mark.parametrize("mode", ["wait", "blocked"])
def test_a_second_request_ends_the_process_at_once_wherever_it_is(mode):
    process = child(mode)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.6)  # past the burst
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 2
    process.communicate()


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert stop.reason == "signal SIGTERM"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
    ("variables", "name", "reason"),
    [
        ({"TORCHELASTIC_RUN_ID": "none"}, "agent", "the launcher, process {pid}, is gone"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "bash", "the launcher, process {pid}, is gone"),
        ({}, "shell", "signal SIGTERM"),  # a run under nohup outlives its shell
    ],
)
def test_a_launcher_that_is_gone_is_a_request(variables, name, reason):
    parent = subprocess.Popen(
        ["bash", "-c", '"$@" & echo $!; wait', name, sys.executable, "-c", CHILD],
        stdout=subprocess.PIPE,
        text=True,
        env={**{k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}, **variables},
    )
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child_pid, signal.SIGTERM)
    assert parent.communicate(timeout=20)[0] == reason.format(pid=parent.pid) + "\n"
