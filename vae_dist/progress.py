"""How far a command is: a bar on a terminal, else a line now and then, on stderr.

In: what is done, and of how much; out of a `with` block nothing stays running.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal


class ProgressBar:
    """Called with the number done, and with the total where it was not known before."""

    def __init__(self, verb: str, total: int, *, unit: str) -> None:
        self.verb, self.total, self.unit = verb, total, unit
        self.said = time.monotonic()
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (verb, BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> ProgressBar:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int | None = None) -> None:
        self.total = self.total if total is None else total
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=self.total)
        elif time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            print(f"{self.verb} {done} of {self.total} {self.unit}", file=sys.stderr, flush=True)
