"""What a person sees of a training run: a progress bar on a terminal, else lines.

In: rows {"group/name": value} at an optimizer step, and sentences. Out: text on a stream. A line
that cannot be written (a job's log on a full disk, a terminal whose ssh session has ended) is lost
and costs nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vae_dist.files import printable, redacted
from vae_dist.tracking.metrics import Value, format_row

_BAR_KEYS = (
    "train/loss",
    "time/images_per_second",
    "time/data_wait_fraction",
    "time/left_seconds",
)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print lines, by default to stdout; they are lost where they cannot be written."""
    with contextlib.suppress(OSError):
        stream = stream or sys.stdout
        lines = [printable(redacted(line)) + "\n" for line in text.split("\n")]
        stream.write("".join(lines))  # in one call: ranks share the terminal
        stream.flush()


def is_terminal(stream: TextIO) -> bool:
    """Whether a progress bar belongs there: not into the log file of a job, nor where TERM=dumb."""
    in_job = "SLURM_JOB_ID" in os.environ
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not in_job


class ConsoleSink:
    """A progress bar on a terminal, else a timestamped line `step=200 loss=104.2 ...` a row.

    On a terminal, training rows move the bar. `eval/` keys have a line of their own everywhere.
    `say` prints a line that does not disturb the bar; print nothing else meanwhile.
    """

    def __init__(self, *, start_step: int, stop_step: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._bar: Progress | None = None
        if is_terminal(self._stream):
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeElapsedColumn(),  # shows life between two rows
                console=Console(file=self._stream, force_terminal=True),
                expand=True,
                transient=True,
            )
            self._task = self._bar.add_task(
                "training", total=stop_step, completed=start_step, figures="starting"
            )
            self._bar.start()

    def say(self, text: str) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.console.print(escape(text), highlight=False, soft_wrap=True)
        else:
            say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", self._stream)

    def advance(self, step: int) -> None:
        """Move the bar between two rows; without a terminal this prints nothing."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, row: Mapping[str, Value]) -> None:
        evaluation = {key: row[key] for key in row if key.startswith(("eval/", "latent/"))}
        training = {key: row[key] for key in row if key not in evaluation}
        if self._bar is not None:
            figures = format_row({key: row[key] for key in _BAR_KEYS if key in row})
            if "train/loss" in row:
                self._bar.update(self._task, completed=step, figures=figures)
        elif training:
            self.say(f"step={step} {format_row(training)}")
        if evaluation:
            self.say(f"step={step} {format_row(evaluation)}")

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        """They lie in the run folder."""

    def close(self, status: str) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError):
                bar.stop()
