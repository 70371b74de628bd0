"""How a session ends, in status.json: written once, by whichever rank is left to do it.

In: what a rank returns or raises, and what the watch finds. Out: `status.json`, and the exception
that the command turns into its exit code. The main process writes how a session ends well. A
failure is written by the lowest rank that lives: the ranks that nobody blames take turns, and who
finds the word of an earlier one leaves it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from vae_dist.config.errors import CommandFailed, ConfigError
from vae_dist.distributed import RankFailed, Runtime
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.console import say
from vae_dist.training.guard import TrainingFailed
from vae_dist.training.watch import RankWatch

TURN_S = 1.0  # that a rank waits for the word of each living one before it
MAX_TURNS = 10


class Ending:
    """Holds the watch over the ranks. `told()` goes around all that they do together."""

    def __init__(self, runtime: Runtime, folder: RunFolder, *, timeout_s: float) -> None:
        self.runtime, self.folder = runtime, folder
        self.watch = RankWatch(runtime, timeout_s=timeout_s, on_lost=self._on_lost)
        self.is_training = False  # before, a ConfigError is raised by all ranks alike
        self.settle: Callable[[], object] = lambda: None  # waits for the checkpoint under way
        self._told: BaseException | None = None
        self._ended_well = False

    def record(self, status: str, *, step: int, reason: str) -> None:
        """Of a session that goes on or ends well; the main process writes."""
        if self.runtime.is_main:
            self._write(status, step, reason)
        self._ended_well = status != "running"

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Say why, once, when what is inside fails: to the other ranks and to status.json.

        Raises TrainingFailed where another rank is the cause.
        """
        try:
            yield
        except BaseException as error:
            if error is self._told:
                raise
            self._told = cause = self._tell(error)
            if cause is error:
                raise
            raise cause from error

    def _tell(self, error: BaseException) -> BaseException:
        """Record the failure; what is to be raised: the error, or its cause on another rank."""
        agreed = isinstance(error, TrainingFailed | RankFailed)
        if agreed or (isinstance(error, ConfigError) and not self.is_training):
            self._settle()
            if agreed:  # else the session was refused before it began
                self._failed(str(error), knows_best=self.runtime.is_main)
            return error
        self.watch.fail(error)
        self._settle()
        if isinstance(error, RuntimeError | OSError):  # as a collective ends when a rank is gone
            message, blamed = self.watch.explain()
            if blamed:
                message = f"{message} (noticed as {type(error).__name__})"
                self._failed(message, blamed)
                return TrainingFailed(message)
        for_people = isinstance(error, ConfigError | CommandFailed)
        kind = "" if for_people else f"{type(error).__name__}: "
        self._failed(f"{self._here()}{kind}{error}", knows_best=True)
        if isinstance(error, ConfigError) and not self.runtime.is_main:
            self._say(str(error))  # the command prints those of the main process
        return error

    def _on_lost(self, message: str, blamed: list[int]) -> None:
        """In the watch's thread, while the main thread is in a collective that never ends."""
        self._say(message)  # first: it may be the disk that stands still
        self._failed(message, blamed)

    def _failed(
        self, reason: str, blamed: list[int] | None = None, *, knows_best: bool = False
    ) -> None:
        """Write "failed", unless a rank before this one has, or the session has ended well."""
        if not self.folder.session:
            return  # the folder is not ours
        if self._ended_well:
            return  # what fails after that costs no step and no checkpoint
        if not knows_best:
            able = [rank for rank in range(self.runtime.world) if rank not in (blamed or [])]
            turns = able.index(self.runtime.rank) if self.runtime.rank in able else len(able)
            end = time.monotonic() + TURN_S * min(turns, MAX_TURNS)
            while not self._has_ended() and time.monotonic() < end:
                time.sleep(TURN_S / 20)
            if self._has_ended():
                return
        if self.folder.has_token(self.folder.session):  # else another session has taken it over
            self._write("failed", self.folder.newest_step(), reason)

    def _has_ended(self) -> bool:
        """Whether some rank has written how this session ended."""
        found = self.folder.status()
        return found.get("session") == self.folder.session and found["status"] != "running"

    def _write(self, status: str, step: int, reason: str) -> None:
        try:
            self.folder.write_status(status, step=max(0, step), reason=reason)
        except OSError as error:
            self._say(f"warning: cannot write {self.folder.status_path}: {error}")

    def _settle(self) -> None:
        with contextlib.suppress(Exception):
            self.settle()

    def _here(self) -> str:
        return f"rank {self.runtime.rank}: " if self.runtime.world > 1 else ""

    def _say(self, text: str) -> None:
        say(f"{self._here()}{text}", sys.stderr)
