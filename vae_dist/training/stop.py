"""What ends a run early: a request to stop, on which all ranks agree; and what is left of the run.

`StopSignals` catches SIGTERM, SIGUSR1, SIGINT and SIGHUP and notices a launcher that is gone;
`StopRequest` adds the STOP file of the run folder and makes all ranks stop after the same step;
`Outcome` records how a session ends.
No torch is imported before ranks meet: `--help` and wrong configs need none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from vae_dist.config.errors import CommandFailed, ConfigError
from vae_dist.config.launcher import LAUNCHER_VARIABLES
from vae_dist.files import printable_lines
from vae_dist.training.watch import RankWatch

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from vae_dist.distributed import Runtime
    from vae_dist.run.folder import RunFolder

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: run the same command again

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
BURST_S = 2.0  # schedulers and agents deliver one request several times
FOLDER_POLL_S = 0.25


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says at which step and why. All ranks raise it."""


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
                say(f"interrupted before training (signal {signal.Signals(number).name})")
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

    def watch_folder(self, folder: RunFolder, holder: str) -> None:
        """From now on the STOP file of this folder is a request too, and so is the loss of its
        lock. A thread looks: a network file system that hangs must not stop the ranks."""

        def look() -> None:
            while not self._ended.wait(FOLDER_POLL_S):
                with contextlib.suppress(OSError):  # one that is away for a while asks for nothing
                    if folder.stop_path.exists():
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
        answer = self.settle()
        self._pending = self._runtime.ask_any_rank(self._requested())
        return self._answer(answer)

    def agreed_now(self) -> bool:
        """True on every rank when any of them has seen a request. Waits for all ranks."""
        self.settle()
        return self._answer(self._runtime.any_rank(self._requested()))

    def settle(self) -> bool:
        """Wait for the last message between the ranks, which every rank has sent; its answer."""
        pending, self._pending = self._pending, None
        if pending is None:
            return False
        work, flag = pending
        work.wait()
        return bool(flag.item())

    def _answer(self, is_agreed: bool) -> bool:
        if is_agreed:
            self.reason = self.reason or "another rank was asked to stop"
        return is_agreed

    def _requested(self) -> bool:
        self.reason = self.reason or self._signals.reason or self._folder_reason
        return bool(self.reason)


class Outcome:
    """How a session ends: recorded in status.json, and by the exit code of what is raised.

    The main process writes; another rank does where it knows the main process to be gone.
    """

    def __init__(self, runtime: Runtime, folder: RunFolder, *, timeout_s: float) -> None:
        self.runtime, self.folder = runtime, folder
        self.watch = RankWatch(runtime, timeout_s=timeout_s, on_lost=self._on_lost)
        self.is_ours = False  # the folder: before, its status is that of another trainer
        # in training it saves what is whole (its argument: whether all ranks raise the same);
        # before, a ConfigError is raised by all ranks alike
        self.save_first: Callable[[bool], object] | None = None
        self.ended = ""  # how, once that is recorded

    def record(
        self, status: str, reason: str, *, step: int | None = None, main_is_gone: bool = False
    ) -> None:
        """`step`: of the newest checkpoint, unless it is given. What fails after the end costs
        nothing, so the first end that is recorded stays."""
        if self.ended or not self.is_ours:
            return
        folder, self.ended = self.folder, status if status != "running" else ""
        if not self.runtime.is_main and not (
            main_is_gone and folder.status().get("status", "running") == "running"
        ):
            return
        try:
            folder.write_status(
                status, step=folder.newest_step() if step is None else step, reason=reason
            )
        except OSError as error:
            say(f"warning: cannot write {folder.status_path}: {error}")

    @contextlib.contextmanager
    def failures_reported(self) -> Iterator[None]:
        """Report what is raised inside to the other ranks, on stderr and in status.json.

        Raises TrainingFailed in place of unexpected errors, whose traceback is printed.
        """
        from vae_dist.distributed import RankFailed

        try:
            yield
        except (TrainingFailed, RankFailed) as error:  # raised by all ranks
            self._save(agreed=True)
            self.record("failed", str(error))
            raise
        except Exception as error:
            if isinstance(error, ConfigError) and self.save_first is None:
                raise
            here = f"rank {self.runtime.rank}: " if self.runtime.world > 1 else ""
            if not isinstance(error, ConfigError | CommandFailed):
                say(f"{here}{traceback.format_exc()}")
            elif not self.runtime.is_main:  # whose own errors the command prints
                say(f"{here}{error}")
            self._save(agreed=False)  # before the launcher learns of it, and ends all ranks
            reason, main_is_gone = self.watch.explain(error)
            self.record("failed", reason, main_is_gone=main_is_gone)
            if isinstance(error, ConfigError):
                raise
            raise TrainingFailed(reason) from error

    def _on_lost(self, report: str, main_is_gone: bool) -> None:
        say(f"failed: {report}")  # first: it may be the disk that hangs
        self._save(agreed=False)
        self.record("failed", report, main_is_gone=main_is_gone)

    def _save(self, *, agreed: bool) -> None:
        try:
            if self.save_first is not None:
                self.save_first(agreed)
        except Exception as error:  # a device that has failed may raise anything
            say(f"warning: the last step is not saved ({error})")


def say(text: str) -> None:
    """On stderr, which may be a closed terminal."""
    with contextlib.suppress(OSError):
        print(printable_lines(text), file=sys.stderr, flush=True)
