from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vae_dist.tracking.sinks import ConsoleSink, JsonlSink, is_terminal


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, steps: range) -> None:
    sink = JsonlSink(path, resume_step=0)
    for step in steps:
        sink.log(step, {"train/loss": step / 2})
    sink.close("interrupted")


def test_each_row_is_one_object_with_the_step_first(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.log(50, {"train/loss": 1.5, "train/rate_nats": 2.0})
    assert path.read_text() == '{"step": 50, "train/loss": 1.5, "train/rate_nats": 2.0}\n'
    sink.close("finished")
    sink.close("finished")


def test_resume_cuts_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(1, 8))
    with path.open("a") as file:
        file.write('{"step": 3, "train/lo')
    sink = JsonlSink(path, resume_step=4)
    sink.log(5, {"train/loss": 0.0})
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5]
    assert rows(path)[-1]["train/loss"] == 0.0


def test_what_is_made_up_after_a_resume_joins_the_row_of_its_step(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(1, 5))
    for _ in range(2):  # killed before the checkpoint that follows, it is made up again
        sink = JsonlSink(path, resume_step=3)
        sink.log(3, {"eval/loss": 0.5, "eval/best": math.nan})
        sink.log(4, {"loss": 9.0})
        sink.close("interrupted")
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4]
    third = rows(path)[2]
    assert third.pop("eval/best") is None
    assert third == {"step": 3, "train/loss": 1.5, "eval/loss": 0.5}


def test_a_line_that_is_no_row_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(1, 3))
    path.write_text(path.read_text() + "\0\0\0\n[1]\n{}\n")
    JsonlSink(path, resume_step=9).close("finished")
    assert [row["step"] for row in rows(path)] == [1, 2]


def test_a_clean_log_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(1, 4))
    inode = path.stat().st_ino
    JsonlSink(path, resume_step=3).close("finished")
    assert path.stat().st_ino == inode


def test_what_json_has_no_word_for_is_null(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.log(1, {"train/loss": math.nan, "optim/grad_norm": math.inf, "optim/lr": 0.1})
    assert rows(path) == [{"step": 1, "train/loss": None, "optim/grad_norm": None, "optim/lr": 0.1}]


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond the limit, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def log_on_a_full_disk(path: Path, *, num_rows: int = 10) -> JsonlSink:
    """Rows of some 30 bytes where there is room for 100 bytes."""
    sink = JsonlSink(path, resume_step=0)
    with files_of_at_most(100):
        for step in range(1, num_rows + 1):
            with contextlib.suppress(OSError):
                sink.log(step, {"train/loss": step / 2})
    return sink


def test_rows_wait_for_a_full_disk_and_come_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.jsonl"
    sink = log_on_a_full_disk(path, num_rows=500)  # more than the buffer of a file holds
    assert path.stat().st_size == 100  # the last row is torn
    sink.log(501, {"train/loss": 5.5})
    assert [row["step"] for row in rows(path)] == list(range(1, 502))
    sink.close("finished")
    assert capsys.readouterr().out == ""


def test_rows_beyond_the_backlog_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.jsonl"
    monkeypatch.setattr("vae_dist.tracking.sinks.BACKLOG_BYTES", 100)
    sink = log_on_a_full_disk(path)
    sink.log(11, {"train/loss": 5.5})
    sink.close("finished")
    found = [row["step"] for row in rows(path)]
    assert found[:3] == [1, 2, 3] and found == sorted(found)
    assert f"{path} lacks {11 - len(found)} rows" in capsys.readouterr().out


def test_rows_that_still_wait_at_the_end_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.jsonl"
    sink = log_on_a_full_disk(path)
    with files_of_at_most(100), pytest.raises(OSError):
        sink.close("finished")
    sink.close("finished")
    assert capsys.readouterr().out == f"warning: {path} lacks 7 rows that the disk did not take\n"
    JsonlSink(path, resume_step=99).close("finished")
    assert [row["step"] for row in rows(path)] == [1, 2, 3]


ROW = {"train/loss": 104.23, "time/images_per_second": 1834.2, "time/left_seconds": 92.0}


def test_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(start_step=0, stop_step=300, stream=stream)
    sink.log(200, {**ROW, "eval/neg_elbo_nats": 95.5})
    sink.image(200, "images/samples", Path("runs/a/images/samples.png"), "step 200")
    sink.close("finished")
    first, evaluation, second = stream.getvalue().splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert re.fullmatch(stamp + "step=200 loss=104.2 images_per_second=1834 left=1m32s", first)
    assert re.fullmatch(stamp + "step=200 eval/neg_elbo_nats=95.5", evaluation)
    assert re.fullmatch(stamp + "step=200 pictures in runs/a/images", second)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    return io.StringIO()


def test_rows_that_come_faster_than_a_person_reads_have_few_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [10.0]
    monkeypatch.setattr("vae_dist.tracking.sinks.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    sink = ConsoleSink(start_step=0, stop_step=5, stream=stream)
    for step, clock[0] in enumerate([10.0, 10.05, 10.15, 10.25, 10.3], start=1):
        sink.log(step, {"train/loss": 1.0})
    assert re.findall(r"step=(\d)", stream.getvalue()) == ["1", "4", "5"]  # the last one always


def test_a_bar_on_a_terminal(terminal: io.StringIO) -> None:
    sink = ConsoleSink(start_step=100, stop_step=300, stream=terminal, terminal=True)
    sink.log(200, ROW)
    sink.log(250, {"eval/neg_elbo_nats": 95.5})
    sink.say("[brackets] stay")
    sink.close("finished")
    sink.close("finished")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "200/300" in text
    assert "loss 104.2  1834 images/s  1m32s left" in text
    assert "step=200" not in text
    assert "step=250 eval/neg_elbo_nats=95.5" in text
    assert "[brackets] stay" in text


def test_a_row_between_close_and_exit_is_a_line(terminal: io.StringIO) -> None:
    sink = ConsoleSink(start_step=0, stop_step=300, stream=terminal, terminal=True)
    sink.close("failed")
    sink.log(200, ROW)
    assert terminal.getvalue().rstrip().endswith("left=1m32s")


LINES = ["config mnist: 7 parameters", "output runs/mnist"]


def test_the_banner_is_framed_on_a_terminal_and_plain_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    sink = ConsoleSink(start_step=0, stop_step=10, stream=stream, terminal=True)
    sink.banner("vae_dist", LINES)
    sink.close("finished")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "vae_dist" in text and re.search(r"output +runs/mnist", text)
    stream = io.StringIO()
    ConsoleSink(start_step=0, stop_step=10, stream=stream).banner("vae_dist", LINES)
    assert [line[20:] for line in stream.getvalue().splitlines()] == LINES


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, True), ({"SLURM_JOB_ID": "7"}, False), ({"TERM": "dumb"}, False)],
)
def test_where_a_progress_bar_belongs(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_terminal(Terminal()) is expected
    assert not is_terminal(io.StringIO())


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_console_on_a_full_disk_loses_lines_and_nothing_else() -> None:
    """A job's stdout is a file, mostly on the disk that the run fills."""
    console = ConsoleSink(start_step=0, stop_step=9, stream=FullDisk(), terminal=False)
    console.banner("vae_dist", ["output runs/x"])
    console.log(1, {"train/loss": 2.0, "eval/neg_elbo_nats": 1.0})
    console.say("warning: step 1: no log (No space left on device); training goes on")


def test_a_terminal_that_goes_away_takes_lines_with_it_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when ssh drops: the other end of the pseudo terminal is closed while the bar moves."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    errors: list[object] = []
    monkeypatch.setattr("threading.excepthook", errors.append)
    master, slave = os.openpty()
    stream = os.fdopen(slave, "w")
    console = ConsoleSink(start_step=0, stop_step=9, stream=stream)
    bar = console._progress
    assert bar is not None
    os.close(master)
    bar.refresh()  # as its thread does ten times a second
    sys.stderr.write("a line of another package\n")
    console.advance(1)
    console.log(1, {"train/loss": 2.0, "eval/neg_elbo_nats": 1.0})
    console.image(1, "images/samples", Path("samples.png"), "")
    console.banner("vae_dist", LINES)
    console.say("warning: step 1")
    assert console._progress is None and not bar.live.is_started
    console.close("finished")
    with contextlib.suppress(OSError):
        stream.close()
    assert errors == []


def test_a_terminal_that_is_slow_keeps_its_bar(terminal: io.StringIO) -> None:
    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            raise BlockingIOError(11, "Resource temporarily unavailable")

    console = ConsoleSink(start_step=0, stop_step=9, stream=Slow(), terminal=True)
    console.say("a line")
    console.say("another")
    assert console._progress is not None
    console.close("finished")
