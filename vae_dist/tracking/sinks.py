"""Where metrics and pictures go: one small protocol, the log file and the console.

What goes in: rows {"group/name": value} and PNG files, each at an optimizer step. What comes out:
`log.jsonl`, one JSON object a row (`JsonlSink`), lines or a progress bar (`ConsoleSink`), and a
W&B run (`vae_dist.tracking.wandb_sink`). Sinks belong to the main process alone.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from vae_dist.files import write_durably
from vae_dist.tracking.metrics import Value, format_duration, format_number, format_row
from vae_dist.tracking.wandb_sink import WandbSink

__all__ = ["ConsoleSink", "JsonlSink", "Sink", "WandbSink", "say"]


BACKLOG_BYTES = 16 << 20  # thousands of rows
_OF_EVALUATION = ("eval/", "latent/")
LINE_S = 0.2  # between two lines of training rows, at least
_SLOW_DATA = 0.1  # part of the time: from here on the bar says so


class Sink(Protocol):
    """What cannot be written raises OSError, which costs a warning; all else ends the run."""

    def log(self, step: int, row: Mapping[str, Value]) -> None: ...

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None: ...

    def close(self, status: str) -> None:
        """`status` is finished, interrupted or failed. Closing twice does no harm."""
        ...


class JsonlSink:
    """Appends each row to `path` as one JSON object, "step" first; at once, so a kill loses none.

    At open, rows past `resume_step` and a torn last line are cut, so that a resumed run has each
    row once; what an evaluation that is made up adds to the row of `resume_step` joins it. Values
    that JSON has no word for (NaN, infinities) are written as null. Rows that the disk does not
    take wait until it does, up to BACKLOG_BYTES of them; a warning tells how many are lost beyond
    that.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int) -> None:
        self._path = Path(path)
        self._last_step = _keep_rows_up_to(self._path, resume_step)
        # unbuffered: of what a full disk took a part, the rest is known
        self._file = self._path.open("ab", buffering=0)
        self._backlog: deque[bytes] = deque()  # the first may be the rest of a row
        self._backlog_bytes = 0
        self._num_lost = 0

    def log(self, step: int, row: Mapping[str, Value]) -> None:
        line = _line(step, row)
        if step == self._last_step and not self._backlog:
            self._join_last(line)
            return
        self._last_step = step
        self._backlog.append(line)
        self._backlog_bytes += len(line)
        try:
            self._write_backlog()
        except OSError:
            if self._backlog_bytes > BACKLOG_BYTES and len(self._backlog) > 1:
                self._backlog_bytes -= len(self._backlog.pop())
                self._num_lost += 1
            raise

    def _join_last(self, line: bytes) -> None:
        """Puts a row's values into the last one, whole: a kill leaves the old row or the new."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        last = json.loads(lines.pop()) if lines else {}
        joined = _ENCODE(last | json.loads(line)).encode() + b"\n"
        write_durably(self._path, [*lines, joined])
        self._file.close()
        self._file = self._path.open("ab", buffering=0)

    def _write_backlog(self) -> None:
        while self._backlog:
            num_written = self._file.write(self._backlog[0])
            self._backlog_bytes -= num_written
            if rest := self._backlog[0][num_written:]:
                self._backlog[0] = rest
            else:
                self._backlog.popleft()
        self._tell_lost()

    def _tell_lost(self) -> None:
        if self._num_lost:
            say(f"warning: {self._path} lacks {self._num_lost} rows that the disk did not take")
            self._num_lost = 0

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        """The picture's file is its own record."""

    def close(self, status: str) -> None:
        if self._file.closed:
            return
        try:
            self._write_backlog()
            os.fsync(self._file.fileno())
        finally:
            self._num_lost += len(self._backlog)
            self._tell_lost()
            self._file.close()


_ENCODE = json.JSONEncoder(allow_nan=False).encode  # json.dumps makes an encoder at each call


def _finite(value: Value) -> Any:
    if isinstance(value, list):
        return [float(f"{item:.5g}") if math.isfinite(item) else None for item in value]
    return value if math.isfinite(value) else None


def _line(step: int, row: Mapping[str, Value]) -> bytes:
    try:
        if list in map(type, row.values()):
            raise ValueError  # its values are shortened
        text = _ENCODE({"step": step, **row})
    except ValueError:
        text = _ENCODE({"step": step} | {key: _finite(value) for key, value in row.items()})
    return text.encode() + b"\n"


def _keep_rows_up_to(path: Path, step: int) -> int:
    """Rewrite the log atomically without later rows and torn lines; leave a clean one alone.

    The step of the last row, -1 where there is none.
    """
    if not path.exists():
        return -1
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _row_step(line) <= step]
    if kept != lines:
        write_durably(path, "".join(kept).encode())
    return int(_row_step(kept[-1])) if kept else -1


def _row_step(line: str) -> float:
    """The step of a row; infinity for what is no row."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, by default to stdout. Where it cannot go (a job's log on a full disk, a pipe
    that nobody reads) the line is lost, and nothing else."""
    with contextlib.suppress(OSError):
        stream = stream or sys.stdout
        stream.write(text + "\n")  # at once: ranks share the terminal
        stream.flush()


def is_terminal(stream: TextIO) -> bool:
    """Whether a progress bar belongs there: not into the log file of a job, nor where TERM=dumb."""
    in_job = "SLURM_JOB_ID" in os.environ
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not in_job


@functools.lru_cache(maxsize=32)
def _of_evaluation(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if key.startswith(_OF_EVALUATION))


@functools.lru_cache(maxsize=1)
def _timestamp(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


class _Terminal:
    """What rich writes to. A terminal goes away with its ssh session or tmux server: from then on
    `is_gone`, and what is written is lost. The bar's own thread and the redirected stderr write
    here too, so that neither meets an error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_gone = False

    def write(self, text: str) -> int:
        with self._no_error():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._no_error():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _no_error(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # it is slow, no more
            pass
        except OSError:
            self.is_gone = True


class ConsoleSink:
    """A progress bar on a terminal, else a timestamped line `step=200 loss=104.2 ...` a row, but
    of training rows at most five a second; the latter also under SLURM.

    On a terminal, training rows move the bar. `eval/` keys have a line of their own everywhere.
    `say` prints a line of text that does not disturb the bar; print nothing else meanwhile. What
    cannot be written is lost; no method raises OSError.
    """

    def __init__(
        self,
        *,
        start_step: int,
        stop_step: int,
        stream: TextIO | None = None,
        terminal: bool | None = None,
    ) -> None:
        self._stream = stream or sys.stdout
        if terminal is None:
            terminal = is_terminal(self._stream)
        self._pictured_step = -1
        self._stop_step, self._next_line_s = stop_step, 0.0
        self._progress: Progress | None = None
        self._terminal = _Terminal(self._stream)
        self._task = TaskID(0)
        if terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),  # shows life between two rows
                console=Console(file=cast(TextIO, self._terminal), force_terminal=True),
                expand=True,
                transient=True,
            )
            self._task = self._progress.add_task(
                "training", total=stop_step, completed=start_step, figures="starting"
            )
            self._progress.start()
            atexit.register(self._progress.stop)  # else an error leaves the cursor hidden

    def _bar(self) -> Progress | None:
        """None where there is no terminal, or no longer."""
        if self._terminal.is_gone:
            self.close("")
        return self._progress

    def say(self, text: str) -> None:
        if (bar := self._bar()) is not None:
            bar.console.print(escape(text), highlight=False, soft_wrap=True)
        else:
            say(f"{_timestamp(int(time.time()))} {text}", self._stream)

    def banner(self, title: str, lines: list[str]) -> None:
        """Lines that begin with their label: framed on a terminal, else one after the other."""
        if (bar := self._bar()) is None:
            for line in lines:
                self.say(line)
            return
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(overflow="fold")
        for line in lines:
            label, _, text = line.partition(" ")
            facts.add_row(Text(label), Text(text))
        panel = Panel(facts, title=Text(title), title_align="left", border_style="blue")
        bar.console.print(panel)

    def advance(self, step: int) -> None:
        """Move the bar between two rows; without a terminal this prints nothing."""
        if (bar := self._bar()) is not None:
            bar.update(self._task, completed=step)

    def log(self, step: int, row: Mapping[str, Value]) -> None:
        bar = self._bar()
        evaluation = {key: row[key] for key in _of_evaluation(tuple(row))}
        training = row
        if evaluation:
            training = {key: value for key, value in row.items() if key not in evaluation}
        if training and bar is None and self._is_worth_a_line(step):
            self.say(format_row(step, training))
        if evaluation:
            self.say(format_row(step, evaluation))
        if "train/loss" in row and bar is not None:
            bar.update(self._task, completed=step, figures=_bar_figures(row))

    def _is_worth_a_line(self, step: int) -> bool:
        """Of training rows that come faster than a person reads, some have none."""
        now = time.monotonic()
        if now < self._next_line_s and step != self._stop_step:
            return False
        self._next_line_s = now + LINE_S
        return True

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        if step != self._pictured_step:  # one line for all pictures of a step
            self._pictured_step = step
            self.say(f"step={step} pictures in {png_path.parent}")

    def close(self, status: str) -> None:
        bar, self._progress = self._progress, None
        if bar is not None:
            bar.stop()


_BAR_FIGURES: dict[str, Callable[[float], str]] = {
    "train/loss": lambda value: f"loss {format_number(value)}",
    "train/bits_per_dim": lambda value: f"{value:.3f} bits/dim",
    "time/images_per_second": lambda value: f"{value:.0f} images/s",
    "time/left_seconds": lambda value: f"{format_duration(value)} left",
}


def _bar_figures(row: Mapping[str, Value]) -> str:
    """The few numbers that matter, and the wait for data where it costs speed."""
    figures = [
        words(value)
        for key, words in _BAR_FIGURES.items()
        if not isinstance(value := row.get(key, []), list)
    ]
    wait = row.get("time/data_wait_fraction", 0.0)
    if not isinstance(wait, list) and wait > _SLOW_DATA:
        figures.append(f"{wait:.0%} waiting for data")
    return "  ".join(figures)
