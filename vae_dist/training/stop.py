"""What ends a run early: a request to stop, on which all ranks agree, or ranks that stall.

`StopSignals` catches SIGTERM, SIGUSR1, SIGINT and SIGHUP and notices a launcher that is gone;
`StopRequest` adds the STOP file of the run folder and makes all ranks stop after the same step;
`RankWatch` publishes each rank's step and phase, and ends a run in which no rank moves; `Outcome`
records how a session ends.
No torch is imported before ranks meet: `--help` and wrong configs need none.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterator
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from vae_dist.config.errors import CommandFailed, ConfigError
from vae_dist.config.launcher import LAUNCHER_VARIABLES

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from vae_dist.distributed import Runtime
    from vae_dist.run.folder import RunFolder, RunLock

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: run the same command again

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
T = TypeVar("T")

BURST_S = 2.0  # schedulers and agents deliver one request several times
FOLDER_POLL_S = 0.25
MAX_BEAT_S = 2.0
SILENT_BEATS = 5  # without a sign of life: the process is frozen or gone
FAILURE = "watch/failure"  # key of the first failure
LAST_WORD_S = 60.0  # that a stalled rank takes for its report: the disk may hang too


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says at which step and why."""


class StopSignals:
    """Use as a context manager on the main thread; `reason` is empty until the first signal.

    A second request ends the process at once. Python runs handlers between bytecodes of the main
    thread, which may be inside a collective that never ends, so a thread counts the requests: the
    interpreter's C handler wakes it.
    """

    def __init__(self) -> None:
        self._reason = ""
        self.exits_at_once = False  # while this process waits in C++ and has nothing to save
        self._launcher: int | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._previous_descriptor = -1
        self._reader = self._writer = -1

    @property
    def reason(self) -> str:
        # a launcher that is killed passes nothing on; its processes would train on unseen
        if not self._reason and self._launcher not in (None, os.getppid()):
            self._reason = f"the launcher, process {self._launcher}, is gone"
        return self._reason

    def __enter__(self) -> StopSignals:
        if any(name in os.environ for name in LAUNCHER_VARIABLES):
            self._launcher = os.getppid()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)  # as set_wakeup_fd wants it
        threading.Thread(target=self._count, name="stop-signals", daemon=True).start()
        self._previous_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            # nohup has SIGHUP ignored; launch/sweep.sbatch has SIGUSR1 ignored on its way here
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_descriptor)
        os.write(self._writer, b"\0")  # no signal: ends the thread
        os.close(self._writer)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or f"signal {signal.Signals(number).name}"

    def _count(self) -> None:
        first_s: float | None = None
        while (number := os.read(self._reader, 1)[0]) != 0:
            if number not in SIGNALS:
                continue
            if self.exits_at_once:
                name = signal.Signals(number).name
                with contextlib.suppress(OSError):
                    print(f"interrupted before training (signal {name})", file=sys.stderr)
                os._exit(EXIT_INTERRUPTED)
            if first_s is None:
                first_s = time.monotonic()
            elif time.monotonic() - first_s > BURST_S:
                os._exit(128 + number)
        os.close(self._reader)


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
        """From now on the STOP file of this folder is a request too, and so is the loss of its
        lock, or another name: the checkpoint is written there. A thread looks: a network file
        system that hangs must not stop the ranks."""
        holder, place = lock.holder, lock.place()

        def look() -> None:
            nonlocal place
            while not self._ended.wait(FOLDER_POLL_S):
                with contextlib.suppress(OSError):  # one that is away for a while asks for nothing
                    if place != (now := lock.place()) and (now / "checkpoints").is_dir():
                        folder.move(now)
                        self._folder_reason, place = f"the run folder is {now} now", now
                    elif folder.stop_path.exists():
                        self._folder_reason = f"{folder.stop_path} exists"
                    elif folder.holder() not in (holder, ""):
                        self._folder_reason = "another trainer has taken the run folder"

        threading.Thread(target=look, name="run-folder", daemon=True).start()

    def end(self) -> None:
        """Look at the folder no more."""
        self._ended.set()

    def agreed(self) -> bool:
        """True on every rank after the same call, one call after the first rank saw a request."""
        if self._runtime.world == 1:
            return self._requested()
        answer = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            answer = bool(flag.item())
        self._pending = self._runtime.ask_any_rank(self._requested())
        return self._answer(answer)

    def agreed_now(self) -> bool:
        """True on every rank when any of them has seen a request. Waits for all ranks."""
        self.settle()
        return self._answer(self._runtime.any_rank(self._requested()))

    def settle(self) -> None:
        """Wait for the last message between the ranks: every rank has sent its part."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def _answer(self, is_agreed: bool) -> bool:
        if is_agreed:
            self.reason = self.reason or "another rank was asked to stop"
        return is_agreed

    def _requested(self) -> bool:
        self.reason = self.reason or self._signals.reason or self._folder_reason
        return bool(self.reason)


class RankWatch:
    """Each rank's step and phase, published in the key-value store through which the ranks met.

    A rank that fails says so there, and the others end. A rank that has not moved for `timeout_s`
    reports the table of all ranks and ends with exit code 1, from a thread: its main thread is
    inside a collective that cannot be left. While all ranks live, the time does not count as long
    as one is in start-up (indexing, downloads) or in a phase and shape for the first time
    (compilation). Idle where there is one process.

    `on_lost(report, main_is_gone)` is called before such an end.
    """

    def __init__(
        self, runtime: Runtime, *, timeout_s: float, on_lost: Callable[[str, bool], None]
    ) -> None:
        self._rank, self._world = runtime.rank, runtime.world
        self._timeout_s, self._on_lost = timeout_s, on_lost
        self._beat_s = min(MAX_BEAT_S, timeout_s / 20)
        self._answer_s = max(2.0, SILENT_BEATS * self._beat_s)  # longest wait for the store
        process = f"process {os.getpid()} on {socket.gethostname()}"
        self._state: dict[str, Any] = {"beat": 0, "process": process}
        self._seen: set[tuple[str, Hashable]] = set()
        self._all_timed = True  # the ranks of the last table
        self._ended = threading.Event()
        self.at(-1, "ranks")

    def __enter__(self) -> RankWatch:
        if self._world > 1:
            from torch.distributed.distributed_c10d import _get_default_store

            # a client of its own: a thread must not wait behind an operation of another
            store: Any = _get_default_store()
            self._store = store.clone()
            self._store.set_timeout(timedelta(seconds=self._answer_s))
            self._publish()
            threading.Thread(target=self._run, name="rank-watch", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        """Report nothing any more: no rank waits for the others from here on."""
        self._ended.set()

    def at(self, step: int, phase: str, shape: Hashable = None) -> None:
        """This rank is now at this step (-1: start-up) and phase, with data of this shape."""
        if self._world == 1:
            return
        is_timed = step >= 0 and (phase, shape) in self._seen
        self._seen.add((phase, shape))
        self._state |= {"step": step, "phase": phase, "is_timed": is_timed}
        self._moved_at = time.monotonic()

    def explain(self, error: BaseException) -> tuple[str, bool]:
        """Why the run fails, given the error of this rank, and whether the main process is gone.
        The error is broadcast. What a collective raises is the fault of a rank that is gone."""
        reason = f"{type(error).__name__}: {error}"
        if self._world == 1:
            return reason, False
        reason = f"rank {self._rank}: {reason}"
        with contextlib.suppress(RuntimeError):  # the store's host may be what is gone
            if not isinstance(error, RuntimeError | OSError) or self._ask(
                self._store.check, [FAILURE]
            ):
                return self._tell(reason), False
        table, silent = self._table()
        if silent:
            reason = f"{table} (noticed as {type(error).__name__})"
        with contextlib.suppress(RuntimeError):
            reason = self._tell(reason)
        return reason, 0 in silent

    def _tell(self, reason: str) -> str:
        """The reason of the rank that was the first to fail."""
        self._ended.set()
        return str(self._ask(self._store.compare_set, FAILURE, "", reason).decode())

    def _run(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(RuntimeError):
                self._publish()
                if self._ask(self._store.check, [FAILURE]):
                    self._end(self._ask(self._store.get, FAILURE).decode(), main_is_gone=False)
            moved_at = self._moved_at
            if time.monotonic() - moved_at > self._timeout_s:
                table, silent = self._table()
                if self._moved_at == moved_at and (silent or self._all_timed):
                    report = f"no step for {self._timeout_s:g} s (runtime.timeout_s): {table}"
                    self._end(report, main_is_gone=0 in silent)

    def _end(self, report: str, *, main_is_gone: bool) -> None:
        if self._ended.is_set():  # the main thread has said why, or all is done
            return
        last_word = threading.Thread(target=self._on_lost, args=(report, main_is_gone), daemon=True)
        last_word.start()
        last_word.join(LAST_WORD_S)
        os._exit(1)

    def _ask(self, operation: Callable[..., T], *args: object) -> T:
        """What an operation of the store gives, from a thread: on a frozen host it does not return.
        Raises RuntimeError then."""
        answers: list[T] = []
        thread = threading.Thread(target=lambda: answers.append(operation(*args)), daemon=True)
        thread.start()
        thread.join(self._answer_s)
        if not answers:
            raise RuntimeError("the key-value store of the ranks does not answer")
        return answers[0]

    def _publish(self) -> None:
        self._state["beat"] += 1
        self._ask(self._store.set, f"watch/{self._rank}", json.dumps(self._state))

    def _table(self) -> tuple[str, list[int]]:
        """What each rank is doing, and the ranks without a sign of life; takes a few beats."""
        try:
            before = self._read()
            for _ in range(SILENT_BEATS):
                time.sleep(self._beat_s)
                self._publish()
            now = self._read()
        except RuntimeError:
            return "rank 0, which holds the ranks' key-value store, is frozen or gone", [0]
        silent = [
            rank
            for rank, one in enumerate(now)
            if rank != self._rank and one["beat"] == before[rank]["beat"]
        ]
        self._all_timed = all(one["is_timed"] for one in now)
        lines = []
        for rank, one in enumerate(now):
            place = f"at step {one['step']} in" if one["step"] >= 0 else "in start-up:"
            fate = "frozen or gone, last " if rank in silent else ""
            lines.append(f"rank {rank} ({one['process']}) {fate}{place} {one['phase']}")
        return "; ".join(lines), silent

    def _read(self) -> list[dict[str, Any]]:
        keys = [f"watch/{rank}" for rank in range(self._world)]
        return [json.loads(value) for value in self._ask(self._store.multi_get, keys)]


class Outcome:
    """How a session ends: recorded in status.json, and by the exit code of what is raised.

    The main process writes; another rank does where it knows the main process to be gone.
    """

    def __init__(self, runtime: Runtime, folder: RunFolder, *, timeout_s: float) -> None:
        self.runtime, self.folder = runtime, folder
        self.watch = RankWatch(runtime, timeout_s=timeout_s, on_lost=self._on_lost)
        self.is_ours = False  # the folder: before, its status is that of another trainer
        self.is_training = False  # before, a ConfigError is raised by all ranks alike
        # saves what is whole; its argument: whether all ranks raise the same
        self.save_first: Callable[[bool], object] = lambda agreed: None
        self._is_final = False
        self._reported: BaseException | None = None

    def record(self, status: str, *, step: int, reason: str) -> None:
        """Of a session that goes on or ends well."""
        self._is_final = status != "running"
        if self.runtime.is_main and self.is_ours:
            self._write(status, step, reason)

    @contextlib.contextmanager
    def failures_reported(self) -> Iterator[None]:
        """Report what is raised inside, once, to the other ranks, on stderr and in status.json.

        Raises TrainingFailed in place of unexpected errors, whose traceback is printed.
        """
        try:
            yield
        except Exception as error:
            if error is self._reported:
                raise
            self._reported = raised = self._report(error)
            if raised is error:
                raise
            raise raised from error

    def _report(self, error: Exception) -> Exception:
        from vae_dist.distributed import RankFailed

        agreed = isinstance(error, TrainingFailed | RankFailed)  # raised by all ranks
        if agreed or (isinstance(error, ConfigError) and not self.is_training):
            self._save_first(agreed)
            if agreed:
                self._failed(str(error), main_is_gone=False)
            return error
        here = f"rank {self.runtime.rank}: " if self.runtime.world > 1 else ""
        if not isinstance(error, ConfigError | CommandFailed):
            _say(f"{here}{traceback.format_exc()}")
        elif not self.runtime.is_main:  # whose own errors the command prints
            _say(f"{here}{error}")
        self._save_first(agreed=False)  # before the launcher learns of it, and ends all ranks
        reason, main_is_gone = self.watch.explain(error)
        self._failed(reason, main_is_gone=main_is_gone)
        return error if isinstance(error, ConfigError) else TrainingFailed(reason)

    def _on_lost(self, report: str, main_is_gone: bool) -> None:
        _say(f"failed: {report}")  # first: it may be the disk that hangs
        self._save_first(agreed=False)
        self._failed(report, main_is_gone=main_is_gone)

    def _failed(self, reason: str, *, main_is_gone: bool) -> None:
        if self._is_final or not self.is_ours:
            return  # what fails after the end costs no step and no checkpoint
        if self.runtime.is_main or (
            main_is_gone and self.folder.status().get("status", "running") == "running"
        ):
            self._write("failed", self.folder.newest_step(), reason)

    def _write(self, status: str, step: int, reason: str) -> None:
        try:
            self.folder.write_status(status, step=max(0, step), reason=reason)
        except OSError as error:
            _say(f"warning: cannot write {self.folder.status_path}: {error}")

    def _save_first(self, agreed: bool) -> None:
        try:
            self.save_first(agreed)
        except Exception as error:  # a device that has failed may raise anything
            _say(f"warning: the last step is not saved ({error})")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal
        print(text, file=sys.stderr, flush=True)
