"""Where the time to the first step goes, counted from the start of the process."""

from __future__ import annotations

import os
import time

import psutil


class Startup:
    """`mark(what)` at the end of each part; `line()` says them all."""

    def __init__(self) -> None:
        self._begun = self._last = psutil.Process(os.getpid()).create_time()
        self._parts: list[tuple[str, float]] = []

    def mark(self, what: str) -> None:
        now = time.time()
        self._parts.append((what, now - self._last))
        self._last = now

    def line(self) -> str:
        parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in self._parts)
        return f"first step after {self._last - self._begun:.1f} s: {parts}"
