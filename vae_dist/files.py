"""Files that a kill cannot tear (temporary name, fsync, rename), and how far a command is."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal


def write_durably(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file, whole or in pieces, under a temporary name, sync it, and rename it."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ProgressBar:
    """A bar on a terminal, else a line now and then, on stderr.

    Called with the number done, and with the total where it was not known before.
    """

    def __init__(self, verb: str, total: int, *, unit: str) -> None:
        self.verb, self.total, self.unit = verb, total, unit
        self.said = time.monotonic()
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

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
