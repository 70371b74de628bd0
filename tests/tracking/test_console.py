"""What the console prints, with and without a terminal, and on one that takes nothing."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

from vae_dist.tracking.console import ConsoleSink, is_terminal

ROW = {"train/loss": 104.23, "time/images_per_second": 1834.2, "time/left_seconds": 92.0}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    return stream


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), [10.0]
    monkeypatch.setattr("vae_dist.tracking.console.time.monotonic", lambda: clock[0])
    sink = ConsoleSink(start_step=0, stop_step=300, stream=stream)
    sink.say("output runs/mnist")
    sink.log(200, {**ROW, "eval/neg_elbo_nats": 95.5})
    sink.image(200, "images/samples", Path("runs/a/images/samples.png"), "step 200")
    for step, clock[0] in ((201, 10.05), (202, 10.25), (300, 10.3)):  # the last one always
        sink.log(step, {"train/loss": 1.0})
    sink.close("finished")
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[20:] for line in lines] == [
        "output runs/mnist",
        "step=200 loss=104.2 images_per_second=1834 left=1m32s",
        "step=200 eval/neg_elbo_nats=95.5",
        "step=200 pictures in runs/a/images",
        "step=202 loss=1",
        "step=300 loss=1",
    ]


def test_a_bar_on_a_terminal(terminal: io.StringIO) -> None:
    sink = ConsoleSink(start_step=100, stop_step=300, stream=terminal)
    sink.say("output runs/mnist")
    sink.log(200, ROW)
    sink.log(250, {"eval/neg_elbo_nats": 95.5})
    sink.say("[brackets] stay")
    for _ in range(2):
        sink.close("finished")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "output runs/mnist" in text
    assert "200/300" in text and "loss=104.2 images_per_second=1834 left=1m32s" in text
    assert "step=200" not in text and "step=250 eval/neg_elbo_nats=95.5" in text
    assert "[brackets] stay" in text
    sink.log(200, ROW)  # between close and exit it is a line
    assert re.search(r"\d\d step=200 loss=104.2 .* left=1m32s\n$", terminal.getvalue())


def test_where_a_progress_bar_belongs(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_terminal(terminal) and not is_terminal(io.StringIO())
    for name, value in (("TERM", "dumb"), ("SLURM_JOB_ID", "7")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not is_terminal(terminal)


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_what_takes_no_line_costs_the_lines_alone(
    on_a_terminal: bool, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log file of a job on a full disk, and a terminal whose ssh session has ended."""
    monkeypatch.setattr("threading.excepthook", lambda _: None)  # of the thread of the bar
    if on_a_terminal:
        master, slave = os.openpty()
        stream = os.fdopen(slave, "w")
    else:
        stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    console = ConsoleSink(start_step=0, stop_step=9, stream=stream)
    if on_a_terminal:
        os.close(master)
    console.advance(1)
    console.log(1, {"train/loss": 2.0, "eval/neg_elbo_nats": 1.0})
    console.image(1, "images/samples", Path("samples.png"), "")
    console.say("warning: step 1: no log (No space left on device); training goes on")
    console.close("finished")
    with contextlib.suppress(OSError):
        stream.close()
