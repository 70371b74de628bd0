"""Which rank do the others wait for? A heartbeat per rank, and a diagnosis when nothing moves.

In: each rank's place (step, what it is doing), marked from start-up on. Out: after `timeout_s` at
one place, a message that names the rank that is frozen, gone, failed or behind, on every other
rank, which then ends. A thread publishes the place every few seconds in the key-value store through
which the ranks met; a rank whose entry stands still has no running process behind it.

Collectives cannot be asked for this: a rank that waits in one is inside C++ until the backend's own
timeout, and that error does not know who is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from vae_dist.distributed import Runtime

STARTUP = ("ranks", "run folder", "newest checkpoint", "shards", "trackers", "model")
PLACES = (*STARTUP, "data", "step", "log", "evaluation", "checkpoint")  # of a step, in this order
MAX_BEAT_S = 5.0
LAST_WORD_S = 60.0  # that a rank which ends may take for it: the disk may stand still too
SILENT_BEATS = 3  # without a sign of life; that long takes the diagnosis


class RankWatch:
    """Use as a context manager around all that ranks do together; idle where there is one process.

    `on_lost(message, blamed ranks)` is called in a thread when this rank has not moved for
    `timeout_s`; then the process ends with exit code 1.
    """

    def __init__(
        self, runtime: Runtime, *, timeout_s: float, on_lost: Callable[[str, list[int]], None]
    ) -> None:
        self._rank, self._world = runtime.rank, runtime.world
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._beat_s = min(MAX_BEAT_S, timeout_s / 20)
        self._state: dict[str, Any] = {
            "beat": 0,
            "step": -1,
            "place": 0,
            "failed": None,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._moved_at = time.monotonic()
        self._ended = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._prefix = f"watch/{runtime.broadcast(uuid.uuid4().hex)}"
        self._seen: dict[int, dict[str, Any]] = {}
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        if self._world > 1:
            # clients of their own: a thread must not wait behind an operation of another
            self._beating, self._asking = self._client(), self._client()

    def __enter__(self) -> RankWatch:
        if self._world > 1:
            self._publish()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        """No longer say anything: nobody waits for the others from here on."""
        self._ended.set()

    def at(self, step: int, place: str) -> None:
        """This rank is now at this place; -1 is the step of start-up."""
        self._state["step"], self._state["place"] = step, PLACES.index(place)
        self._moved_at = time.monotonic()
        if step < 0 and self._world > 1:  # these are few, and each may be the last
            with contextlib.suppress(RuntimeError):
                self._publish()

    def explain(self) -> tuple[str, list[int]]:
        """After `fail`: what caused it and which other ranks, none where this one is the first."""
        if self._world == 1:
            return "", []
        with self._one_at_a_time:
            return self._diagnosis()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank fails, and why, before they notice that it is gone."""
        if self._world == 1:
            return
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

        def tell() -> None:
            order = self._asking.add(f"{self._prefix}/failures", 1)
            self._state["failed"] = [order, text]
            self._publish()

        self._in_time(tell)

    # the thread

    def _run(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(RuntimeError):  # the store's host may be what is gone
                self._publish()
            if time.monotonic() - self._moved_at > self._timeout_s and not self._state["failed"]:
                # in a thread of its own: this one goes on to show that this rank is alive
                threading.Thread(target=self._lost, daemon=True).start()
                self._moved_at = float("inf")

    def _lost(self) -> None:
        with self._one_at_a_time:
            message, blamed = self._diagnosis()
        if self._ended.is_set():
            return
        where = "start-up stands still" if self._state["step"] < 0 else "no step"
        waited = f"{where} for {self._timeout_s:g} s (runtime.timeout_s)"
        last_word = threading.Thread(
            target=self._on_lost, args=(f"{waited}: {message}", blamed), daemon=True
        )
        last_word.start()
        last_word.join(LAST_WORD_S)
        os._exit(1)  # the main thread is inside a collective that cannot be left

    def _publish(self) -> None:
        self._state["beat"] += 1
        self._beating.set(f"{self._prefix}/{self._rank}", json.dumps(self._state))

    def _client(self) -> Any:
        store: Any = dist.distributed_c10d._get_default_store()
        store = store.clone()
        store.set_timeout(timedelta(seconds=max(2.0, SILENT_BEATS * self._beat_s)))
        return store

    # the diagnosis

    def _diagnosis(self) -> tuple[str, list[int]]:
        """What is wrong and with which ranks; none where it cannot be said."""
        first, second = self._read_all(), None
        if first:
            if earlier := self._earlier_failure(first):
                return earlier
            self._ended.wait(SILENT_BEATS * self._beat_s)
            second = self._read_all()
        if not first or not second:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                return "the launcher's key-value store does not answer", []
            return "rank 0, which holds the ranks' key-value store, is frozen or gone", [0]
        others = [rank for rank in range(self._world) if rank != self._rank]
        silent = [
            rank
            for rank in others
            if first[rank]["beat"] == second[rank]["beat"] and not second[rank]["failed"]
        ]
        if silent:
            names = "; ".join(f"{_name(r, second[r])}, {_place(second[r])}" for r in silent)
            return f"frozen or gone: {names}", silent
        if earlier := self._earlier_failure(second):
            return earlier
        if self._state["failed"]:
            return "this rank failed first", []
        at = {rank: (second[rank]["step"], second[rank]["place"]) for rank in range(self._world)}
        behind = [rank for rank in at if at[rank] == min(at.values())]
        if len(behind) < self._world:
            names = "; ".join(f"{_name(r, second[r])}, {_place(second[r])}" for r in behind)
            ahead = max(at, key=lambda rank: at[rank])
            return f"alive but behind: {names}; rank {ahead} is {_place(second[ahead])}", behind
        return f"all ranks are alive and {_place(second[self._rank])}; suspect the network", []

    def _earlier_failure(self, seen: dict[int, dict[str, Any]]) -> tuple[str, list[int]] | None:
        """The rank that failed first, where that is another one: the rest followed it."""
        failed = [r for r in range(self._world) if r != self._rank and seen[r]["failed"]]
        if not failed:
            return None
        rank = min(failed, key=lambda r: seen[r]["failed"][0])
        if self._state["failed"] and self._state["failed"][0] < seen[rank]["failed"][0]:
            return None
        return f"{_name(rank, seen[rank])} failed: {seen[rank]['failed'][1]}", [rank]

    def _read_all(self) -> dict[int, dict[str, Any]] | None:
        """Every rank's entry, or None when the store does not answer in time."""
        found: dict[int, dict[str, Any]] = {}

        def read() -> None:
            keys = [f"{self._prefix}/{rank}" for rank in range(self._world)]
            values = self._asking.multi_get(keys)
            found.update((rank, json.loads(value)) for rank, value in enumerate(values))

        self._in_time(read)
        return found if len(found) == self._world else None

    def _in_time(self, ask: Callable[[], None]) -> None:
        """Ask the store, but not for ever: a frozen host may hold the connection."""

        def suppressed() -> None:
            with contextlib.suppress(RuntimeError):  # its host is gone
                ask()

        thread = threading.Thread(target=suppressed, daemon=True)
        thread.start()
        thread.join(2 * max(2.0, SILENT_BEATS * self._beat_s))


def _name(rank: int, state: dict[str, Any]) -> str:
    return f"rank {rank} (process {state['pid']} on {state['host']})"


def _place(state: dict[str, Any]) -> str:
    if state["step"] < 0:
        return f"in start-up ({PLACES[state['place']]})"
    return f"at step {state['step']} in {PLACES[state['place']]}"
