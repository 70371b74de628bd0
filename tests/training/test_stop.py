"""Requests to stop, in processes of their own: a second one ends the process. Stalled ranks."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from vae_dist.config.launcher import LAUNCHER_VARIABLES
from vae_dist.training import stop
from vae_dist.training.stop import SIGNALS, RankWatch, StopSignals

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

# prints the reason once there is one, or waits for another
CHILD = """
import sys, time
from vae_dist.training import stop
stop.BURST_S = 0.2
with stop.StopSignals() as stop:
    print("ready", flush=True)
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
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert signals.reason == f"signal {number.name}"
    assert [signal.getsignal(one) for one in SIGNALS] == before


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
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            assert signals.reason == reason
    finally:
        signal.signal(number, previous)


def test_one_request_may_come_several_times_and_a_second_one_ends_the_process():
    process = child("wait")
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


# the watch of the ranks: two of them in one process


@pytest.fixture
def ends(monkeypatch):
    """What ended each of two ranks, (rank, report, whether the main process is gone), after they
    were `at` two phases for the second time, from when on their time counts."""
    store = torch.distributed.HashStore()
    found, watches = queue.Queue(), []

    def end_this_thread(code):
        assert code == 1
        raise SystemExit

    monkeypatch.setattr(stop.os, "_exit", end_this_thread)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)

    def after(*places):
        for rank, visited in enumerate(places):
            runtime = SimpleNamespace(rank=rank, world=2, barrier=lambda: None)
            watch = RankWatch(
                runtime, timeout_s=0.4, on_lost=lambda *words, rank=rank: found.put((rank, *words))
            )
            watches.append(watch.__enter__())
            for place in visited:
                watch.at(*place)
        return watches, found

    yield after
    for watch in watches:
        watch.__exit__()
    for thread in threading.enumerate():  # before os._exit is itself again
        if thread.name == "rank-watch":
            thread.join(5)


STEP, CHECKPOINT = [(7, "step")] * 2, [(7, "checkpoint")] * 2


def test_a_stall_ends_every_rank_with_the_table_of_all(ends):
    _, found = ends(STEP, CHECKPOINT)
    both = sorted(found.get(timeout=10) for _ in range(2))
    assert [rank for rank, _, _ in both] == [0, 1]
    for _, report, main_is_gone in both:
        assert report.startswith("no step for 0.4 s (runtime.timeout_s): rank 0 (process ")
        assert "at step 7 in step; rank 1" in report and "at step 7 in checkpoint" in report
        assert not main_is_gone


@pytest.mark.parametrize("step", [-1, 7])
def test_start_up_and_a_first_time_are_not_timed(ends, step):
    _, found = ends(STEP, [(step, "last checkpoint")])
    with pytest.raises(queue.Empty):
        found.get(timeout=0.8)


def test_what_one_rank_fails_with_is_what_all_say(ends):
    (_, other), found = ends(STEP, STEP)
    assert other.explain(KeyError("a bug")) == ("rank 1: KeyError: 'a bug'", False)
    assert found.get(timeout=10) == (0, "rank 1: KeyError: 'a bug'", False)
