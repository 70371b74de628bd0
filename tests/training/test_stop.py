"""Requests to stop: signals, and a launcher that is gone."""

import os
import signal
import time

import pytest

from vae_dist.training.stop import SIGNALS, StopSignals


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
    signal.signal(number, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        before = [signal.getsignal(one) for one in SIGNALS]
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert signals.reason == (f"signal {number.name}" if is_heard else "")
        assert [signal.getsignal(one) for one in SIGNALS] == before
    finally:
        signal.signal(number, previous)


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", ""])
def test_a_launcher_that_is_gone_is_a_request(monkeypatch, launcher):
    monkeypatch.setenv(launcher or "NOTHING", "no")  # a run under nohup outlives its shell
    reason = f"the launcher, process {os.getppid()}, is gone" if launcher else ""
    with StopSignals() as signals:
        assert signals.reason == ""
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert signals.reason == reason
