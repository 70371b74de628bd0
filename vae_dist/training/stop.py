"""What ends a run early: a request to stop, on which all ranks agree, or a rank that is lost.

`StopSignals` catches SIGTERM, SIGUSR1, SIGINT and SIGHUP and notices a launcher that is gone;
`StopRequest` adds the STOP file of the run folder and makes all ranks stop after the same step;
`RankWatch` knows each rank's step and phase, and ends a run of which a rank stalls or fails.
No torch is imported before ranks meet: `--help` and wrong configs need none.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Hashable
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from vae_dist.config.launcher import LAUNCHER_VARIABLES

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from vae_dist.distributed import Runtime
    from vae_dist.run.folder import RunFolder, RunLock

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: run the same command again

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
BURST_S = 2.0  # schedulers and agents deliver one request several times
FOLDER_POLL_S = 0.25

MAX_BEAT_S = 2.0  # of the watch
SILENT_BEATS, SILENT_S = 5, 2.0  # without a sign of life: the process is frozen or gone
FAILURE = "watch/failure"  # key of the first failure
LAST_WORD_S = 60.0  # that a stalled rank takes for its report: the disk may hang too


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says at which step and why. All ranks raise it."""


class StopSignals:
    """Use as a context manager on the main thread; `reason` is empty until the first signal, and a
    second one ends the process at once."""

    def __init__(self) -> None:
        self._reason = ""
        self._first_s: float | None = None
        self._launcher: int | None = None

    @property
    def reason(self) -> str:
        # a launcher that is killed passes nothing on; its processes would train on unseen
        if not self._reason and self._launcher not in (None, os.getppid()):
            self._reason = f"the launcher, process {self._launcher}, is gone"
        return self._reason

    def __enter__(self) -> StopSignals:
        if any(name in os.environ for name in LAUNCHER_VARIABLES):
            self._launcher = os.getppid()
        self._previous = {
            number: signal.signal(number, self._on_signal)
            for number in SIGNALS
            # nohup has SIGHUP ignored; launch/sweep.sbatch has SIGUSR1 ignored on its way here
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._reason = self._reason or f"signal {signal.Signals(number).name}"
        self._first_s = self._first_s or now
        if now - self._first_s > BURST_S:
            os._exit(128 + number)


class StopRequest:
    """`agreed()` once per step on every rank; `agreed_now()` before there are steps.

    At each step the ranks reduce their flags and act on the result one step later, so that no rank
    waits for this message. The flags are in CPU memory: the host does not wait for the device.
    """

    def __init__(self, runtime: Runtime, signals: StopSignals) -> None:
        self.reason = ""
        self._runtime, self._signals = runtime, signals
        self._folder_reason = ""
        self._ended = threading.Event()
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def watch_folder(self, folder: RunFolder, lock: RunLock) -> None:
        """From now on the STOP file of this folder is a request too, and so is another name: the
        checkpoint is written there. A thread looks: a network file system that hangs must not stop
        the ranks."""
        place = lock.place()

        def look() -> None:
            nonlocal place
            while not self._ended.wait(FOLDER_POLL_S):
                with contextlib.suppress(OSError):  # one that is away for a while asks for nothing
                    if place != (now := lock.place()) and (now / "checkpoints").is_dir():
                        folder.move(now)
                        self._folder_reason, place = f"the run folder is {now} now", now
                    elif folder.stop_path.exists():
                        self._folder_reason = f"{folder.stop_path} exists"

        threading.Thread(target=look, name="run-folder", daemon=True).start()

    def end(self) -> None:
        """Look at the folder no more."""
        self._ended.set()

    def agreed(self) -> bool:
        """True on every rank after the same call, one call after the first rank saw a request."""
        if self._runtime.world == 1:
            return self._requested()
        answer = self.settle()
        self._pending = self._runtime.ask_any_rank(self._requested())
        return self._answer(answer)

    def agreed_now(self) -> bool:
        """True on every rank when any of them has seen a request. Waits for all ranks."""
        return self._answer(self._runtime.any_rank(self._requested()))

    def _answer(self, is_agreed: bool) -> bool:
        if is_agreed:
            self.reason = self.reason or "another rank was asked to stop"
        return is_agreed

    def settle(self) -> bool:
        """Wait for the last message between the ranks, which every rank has sent; its answer."""
        pending, self._pending = self._pending, None
        if pending is None:
            return False
        work, flag = pending
        work.wait()
        return bool(flag.item())

    def _requested(self) -> bool:
        self.reason = self.reason or self._signals.reason or self._folder_reason
        return bool(self.reason)


class RankWatch:
    """Use as a context manager on all ranks together; idle where there is one process.

    A rank that fails says so to the others, which end. A rank that has not moved for `timeout_s`
    reports the table of all ranks, calls `on_lost(report, main_is_gone)` and ends with exit code 1,
    from a thread: its main thread is inside a collective that cannot be left. While all ranks live,
    the time does not count as long as one is in start-up (indexing, downloads) or in a phase and
    shape for the first time (compilation).

    One thread exchanges states through the key-value store by which the ranks met, another one
    judges them. The first may hang, for the process that holds the store may be frozen; the second
    counts its own beats, of which a suspended process misses none.
    """

    def __init__(
        self, runtime: Runtime, *, timeout_s: float, on_lost: Callable[[str, bool], None]
    ) -> None:
        self.timeout_s = timeout_s
        self._runtime, self._on_lost = runtime, on_lost
        self._rank, self._world = runtime.rank, runtime.world
        self._beat_s = min(MAX_BEAT_S, timeout_s / 20)
        self._silent_beats = max(SILENT_BEATS, round(SILENT_S / self._beat_s))
        process = f"process {os.getpid()} on {socket.gethostname()}"
        self._state: dict[str, Any] = {"beat": 0, "step": -1, "phase": "ranks", "process": process}
        self._states = [self._state] * self._world  # as the store gave them
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
            self._store.set(f"watch/{self._rank}", json.dumps(self._state))
            self._runtime.barrier()  # from here on all states are there
            for work in (self._exchange, self._judge):
                threading.Thread(target=work, name="rank-watch", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is reported any more: no rank waits for the others from here on."""
        self._ended.set()

    def at(self, step: int, phase: str, shape: Hashable = None) -> None:
        """This rank is now at this step (-1: start-up) and phase, with data of this shape. Each
        phase of start-up comes once."""
        is_timed = (phase, shape) in self._seen
        self._seen.add((phase, shape))
        self._state = self._state | {"step": step, "phase": phase, "is_timed": is_timed}
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

    def _exchange(self) -> None:
        """Publish this rank's state, and read those of all."""
        keys, beat = [f"watch/{rank}" for rank in range(self._world)], 0
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(RuntimeError):  # the store's host is gone
                beat += 1
                self._store.set(keys[self._rank], json.dumps(self._state | {"beat": beat}))
                if self._word:
                    self._failure = self._store.compare_set(FAILURE, "", self._word).decode()
                elif self._store.check([FAILURE]):
                    self._failure = self._store.get(FAILURE).decode()
                found = [json.loads(value) for value in self._store.multi_get(keys)]
                for rank, state in enumerate(found):
                    if state["beat"] != self._states[rank]["beat"]:
                        self._quiet[rank] = 0
                self._states = found

    def _judge(self) -> None:
        while not self._ended.wait(self._beat_s):
            self._quiet = [beats + 1 for beats in self._quiet]
            self._idle += 1
            silent = self._silent()
            is_timed = silent or all(state.get("is_timed") for state in self._states)
            report = self._failure
            if not report and is_timed and self._idle * self._beat_s > self.timeout_s:
                limit = f"{self.timeout_s:g} s (runtime.timeout_s)"
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
        for rank, state in enumerate(self._states):
            place = f"at step {state['step']} in" if state["step"] >= 0 else "in start-up:"
            fate = "frozen or gone, last " if rank in silent else ""
            lines.append(f"rank {rank} ({state['process']}) {fate}{place} {state['phase']}")
        return "; ".join(lines)
