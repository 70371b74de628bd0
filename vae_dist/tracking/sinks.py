"""Where metrics and pictures go: one small protocol, the log file and the console.

What goes in: rows {"group/name": number} and PNG files, each at an optimizer step. What comes out:
`log.jsonl`, one JSON object a row (`JsonlSink`), lines or a progress bar (`ConsoleSink`), and a
W&B run (`vae_dist.tracking.wandb_sink`). Sinks belong to the main process alone.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from vae_dist.files import write_durably
from vae_dist.tracking.metrics import format_duration, format_number, format_row
from vae_dist.tracking.wandb_sink import WandbSink

__all__ = ["ConsoleSink", "JsonlSink", "Sink", "WandbSink"]


class Sink(Protocol):
    def log(self, step: int, row: dict[str, float]) -> None: ...

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None: ...

    def close(self, status: str) -> None:
        """`status` is finished, interrupted or failed. Closing twice does no harm."""
        ...


class JsonlSink:
    """Appends each row to `path` as one JSON object, "step" first; flushed, so a kill loses none.

    At open, rows past `resume_step` and a torn last line are cut, so that a resumed run has each
    row once. Values that JSON has no word for (NaN, infinities) are written as null.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int) -> None:
        path = Path(path)
        _keep_rows_up_to(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, row: dict[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        """The picture's file is its own record."""

    def close(self, status: str) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def _keep_rows_up_to(path: Path, step: int) -> None:
    """Rewrite the log atomically without later rows and torn lines; leave a clean one alone."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _row_step(line) <= step]
    if kept == lines:
        return
    write_durably(path, "".join(kept).encode())


def _row_step(line: str) -> float:
    """The step of a row; infinity for what is no row."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class ConsoleSink:
    """A progress bar on a terminal, else a timestamped line `step=200 loss=104.2 ...` a row.

    On a terminal, training rows move the bar. `eval/` keys have a line of their own everywhere.
    `say` prints a line of text that does not disturb the bar; print nothing else meanwhile.
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
            terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),  # shows life between two rows
                console=Console(file=self._stream, force_terminal=True),
                expand=True,
                transient=True,
            )
            self._task = self._progress.add_task(
                "training", total=stop_step, completed=start_step, figures="starting"
            )
            self._progress.start()
            atexit.register(self._progress.stop)  # else an error leaves the cursor hidden

    def say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(escape(text), highlight=False, soft_wrap=True)
        else:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"{stamp} {text}", file=self._stream, flush=True)

    def advance(self, step: int) -> None:
        """Move the bar between two rows; without a terminal this prints nothing."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def log(self, step: int, row: dict[str, float]) -> None:
        evaluation = {key: value for key, value in row.items() if key.startswith("eval/")}
        training = {key: value for key, value in row.items() if key not in evaluation}
        if training and self._progress is None:
            self.say(format_row(step, training))
        if evaluation:
            self.say(format_row(step, evaluation))
        if "train/loss" in row and self._progress is not None:
            self._progress.update(self._task, completed=step, figures=_bar_figures(row))

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        self.say(f"step={step} {key}={png_path}")

    def close(self, status: str) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _bar_figures(row: dict[str, float]) -> str:
    figures = [f"loss {format_number(row['train/loss'])}"]
    if "time/images_per_second" in row:
        figures.append(f"{row['time/images_per_second']:.0f} images/s")
    if "time/left_seconds" in row:
        figures.append(f"{format_duration(row['time/left_seconds'])} left")
    return "  ".join(figures)
