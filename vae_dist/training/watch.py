"""Each rank's step and phase, known to all of them; a rank that stalls or fails ends the run.

One thread exchanges states through the key-value store by which the ranks met, another one judges
them. The first may hang, for the process that holds the store may be frozen; the second counts its
own beats, of which a suspended process misses none.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Hashable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae_dist.distributed import Runtime

MAX_BEAT_S = 2.0
SILENT_BEATS, SILENT_S = 5, 2.0  # without a sign of life: the process is frozen or gone
FAILURE = "watch/failure"  # key of the first failure
READING = ("data", "evaluation")  # phases in which an outage of the data may be sat out
LAST_WORD_S = 60.0  # that a stalled rank takes for its report: the disk may hang too
UNKNOWN: dict[str, Any] = {"beat": 0, "step": -1, "phase": "ranks", "process": "unknown"}


class RankWatch:
    """Use as a context manager on each rank; idle where there is one process.

    A rank that fails says so to the others, which end. A rank that has not moved for `timeout_s`
    reports the table of all ranks, calls `on_lost(report, main_is_gone)` and ends with exit code 1,
    from a thread: its main thread is inside a collective that cannot be left. While all ranks live,
    the time does not count as long as one is in start-up (indexing, downloads) or in a phase and
    shape for the first time (compilation), and as long as one reads data `reading_s` are added.
    """

    def __init__(
        self, runtime: Runtime, *, timeout_s: float, on_lost: Callable[[str, bool], None]
    ) -> None:
        self._rank, self._world = runtime.rank, runtime.world
        self._timeout_s, self._on_lost = timeout_s, on_lost
        self.reading_s = 0.0  # that a read of data is tried again
        self._beat_s = min(MAX_BEAT_S, timeout_s / 20)
        self._silent_beats = max(SILENT_BEATS, round(SILENT_S / self._beat_s))
        self._state = UNKNOWN | {"process": f"process {os.getpid()} on {socket.gethostname()}"}
        self._states = [UNKNOWN] * self._world  # as the store gave them
        self._quiet = [0] * self._world  # beats since each was heard
        self._idle = 0  # beats since this rank has moved
        self._seen: set[tuple[str, Hashable]] = set()
        self._word = self._failure = ""  # why this rank fails, and why the first one did
        self._ended, self._explains = threading.Event(), False

    def __enter__(self) -> RankWatch:
        if self._world > 1:
            from torch.distributed.distributed_c10d import _get_default_store

            # a client of its own: a thread must not wait behind an operation of another
            store: Any = _get_default_store()
            self._store = store.clone()
            self._store.set_timeout(timedelta(seconds=self._silent_beats * self._beat_s))
            self._exchange()
            for work in (self._exchange_on, self._judge):
                threading.Thread(target=work, name="rank-watch", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is reported any more: no rank waits for the others from here on."""
        self._ended.set()

    def at(self, step: int, phase: str, shape: Hashable = None) -> None:
        """This rank is now at this step (-1: start-up) and phase, with data of this shape."""
        is_timed = step >= 0 and (phase, shape) in self._seen
        self._seen.add((phase, shape))
        self._state |= {"step": step, "phase": phase, "is_timed": is_timed}
        self._idle = 0

    def explain(self, error: BaseException) -> tuple[str, bool]:
        """Why the run fails, given the error of this rank, and whether the main process is gone.
        The error is broadcast. What a collective raises is the fault of a rank that is gone."""
        reason, silent = f"{type(error).__name__}: {error}", []
        if self._world == 1:
            return reason, False
        self._explains, reason = True, f"rank {self._rank}: {reason}"
        if isinstance(error, RuntimeError | OSError):
            self._wait(lambda: self._failure or self._silent())
            if silent := self._silent():
                reason = f"{self._table(silent)} (noticed as {type(error).__name__})"
        self._word = reason
        self._wait(lambda: self._failure)
        self._ended.set()
        return self._failure or reason, 0 in silent

    def _wait(self, until: Callable[[], object]) -> None:
        for _ in range(20 * (self._silent_beats + 3)):
            if until():
                return
            time.sleep(self._beat_s / 20)

    def _exchange_on(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(RuntimeError):  # the store's host is gone
                self._exchange()

    def _exchange(self) -> None:
        """Publish this rank's state, and read those of all that have done so."""
        self._state["beat"] += 1
        self._store.set(f"watch/{self._rank}", json.dumps(self._state))
        if self._word:
            self._failure = self._store.compare_set(FAILURE, "", self._word).decode()
        elif self._store.check([FAILURE]):
            self._failure = self._store.get(FAILURE).decode()
        keys = [f"watch/{rank}" for rank in range(self._world)]
        known = [r for r, key in enumerate(keys) if self._heard(r) or self._store.check([key])]
        values = self._store.multi_get([keys[rank] for rank in known])
        for rank, value in zip(known, values, strict=True):
            found = json.loads(value)
            if found["beat"] != self._heard(rank):
                self._quiet[rank] = 0
            self._states[rank] = found

    def _heard(self, rank: int) -> int:
        return int(self._states[rank]["beat"])

    def _judge(self) -> None:
        while not self._ended.wait(self._beat_s):
            self._quiet = [beats + 1 for beats in self._quiet]
            self._idle += 1
            silent, idle_s = self._silent(), self._idle * self._beat_s
            reads = any(one["phase"] in READING for one in self._states)
            is_timed = all(one.get("is_timed") for one in self._states)
            is_stalled = is_timed and idle_s > self._timeout_s + self.reading_s * reads
            report = self._failure
            if not report and (is_stalled or (silent and idle_s > self._timeout_s)):
                limit = f"{self._timeout_s:g} s (runtime.timeout_s)"
                report = f"no step for {limit}: {self._table(silent)}"
            if report and not self._explains:
                main_is_gone = not self._failure and 0 in silent
                word = threading.Thread(target=self._on_lost, args=(report, main_is_gone))
                word.daemon = True
                word.start()
                word.join(LAST_WORD_S)
                os._exit(1)

    def _silent(self) -> list[int]:
        """Ranks without a sign of life. A state of this rank that does not come back means that the
        store does not answer: the main process holds it."""
        silent = [rank for rank, quiet in enumerate(self._quiet) if quiet > self._silent_beats]
        return [0] if self._rank in silent else silent

    def _table(self, silent: list[int]) -> str:
        """What each rank is doing."""
        lines = []
        for rank, one in enumerate(self._states):
            place = f"at step {one['step']} in" if one["step"] >= 0 else "in start-up:"
            fate = "frozen or gone, last " if rank in silent else ""
            lines.append(f"rank {rank} ({one['process']}) {fate}{place} {one['phase']}")
        return "; ".join(lines)
