"""What the console prints, with and without a terminal, and on one that takes nothing."""

import contextlib
import io
import math
import os
import re

import pytest

from vae_dist.tracking.console import ConsoleSink, is_terminal
from vae_dist.tracking.metrics import format_duration, format_number, format_row

ROW = {"train/loss": 104.23, "time/images_per_second": 1834.2, "time/left_seconds": 92.0}
NUMBERS = {104.23456: "104.2", 0.00031: "0.00031", 18342.7: "18343", 3.0: "3", 200: "200"}
NUMBERS |= {1.5e12: "1.5e+12", math.nan: "nan", math.inf: "inf"}
DURATIONS = {41.6: "42s", 185: "3m05s", 7800: "2h10m", 356400: "4d03h", math.nan: "?", -1: "?"}


def test_numbers_durations_and_rows_without_what_goes_without_saying():
    assert {value: format_number(value) for value in NUMBERS} == NUMBERS
    assert {seconds: format_duration(seconds) for seconds in DURATIONS} == DURATIONS
    row = ROW | {"train/beta": 1.0, "optim/lr": 1e-3, "latent/kl": [1.0], "eval/rate_nats": 9.5}
    row |= {"data/skipped_samples": 0.0, "time/data_wait_fraction": 0.02}
    assert format_row(row) == "loss=104.2 images_per_second=1834 left=1m32s eval/rate_nats=9.5"
    row = {"data/skipped_samples": 2.0, "time/data_wait_fraction": 0.2, "train/loss": math.nan}
    assert format_row(row) == "data/skipped_samples=2 data_wait_fraction=0.2 loss=nan"


def test_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    sink = ConsoleSink(start_step=0, stop_step=300, stream=stream)
    sink.say("output runs/\x1b[2J\n  s3://me:pw@b")
    sink.log(200, {**ROW, "eval/neg_elbo_nats": 95.5})
    sink.close("finished")
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert re.sub(f"(?m)^{time}", "T ", stream.getvalue()).splitlines() == [
        r"T output runs/\x1b[2J",
        "  s3://...@b",
        "T step=200 loss=104.2 images_per_second=1834 left=1m32s",
        "T step=200 eval/neg_elbo_nats=95.5",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name, value in (("TERM", "dumb"), ("SLURM_JOB_ID", "7")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not is_terminal(terminal)
    assert is_terminal(terminal) and not is_terminal(io.StringIO())
    monkeypatch.setenv("COLUMNS", "120")
    sink = ConsoleSink(start_step=100, stop_step=300, stream=terminal)
    sink.log(200, ROW)
    sink.log(250, {"eval/neg_elbo_nats": 95.5})
    sink.say("[brackets] stay")
    for _ in range(2):
        sink.close("finished")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "200/300" in text and "loss=104.2 images_per_second=1834 left=1m32s" in text
    assert "step=200" not in text and "step=250 eval/neg_elbo_nats=95.5" in text
    assert "[brackets] stay" in text
    sink.log(200, ROW)  # between close and exit it is a line
    assert re.search(r"\d\d step=200 loss=104.2 .* left=1m32s\n$", terminal.getvalue())


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_what_takes_no_line_costs_the_lines_alone(on_a_terminal, monkeypatch):
    """The log file of a job on a full disk, and a terminal whose ssh session has ended."""
    monkeypatch.setattr("threading.excepthook", lambda _: None)  # of the thread of the bar
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    master, slave = os.openpty()
    stream = open(slave if on_a_terminal else "/dev/full", "w", buffering=1)  # noqa: SIM115
    console = ConsoleSink(start_step=0, stop_step=9, stream=stream)
    os.close(master)
    console.advance(1)
    console.log(1, {"train/loss": 2.0, "eval/neg_elbo_nats": 1.0})
    console.say("warning: step 1: no log (No space left on device); training goes on")
    console.close("finished")
    with contextlib.suppress(OSError):
        stream.close()
