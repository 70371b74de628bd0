"""A stop on which all ranks agree: a signal or a STOP file, seen by any of them.

At each step the ranks reduce their flags and act on the result one step later, so that no rank
waits for this message: all stop after the same step. The flags are in CPU memory, so that the host
never waits for the device either.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from vae_dist.distributed import Runtime
from vae_dist.run.folder import RunFolder
from vae_dist.training.signals import StopSignals

FILE_POLL_S = 0.25


class StopRequest:
    """`agreed()` once per step on every rank; `agreed_now()` before there are steps."""

    def __init__(self, runtime: Runtime, signals: StopSignals) -> None:
        self.reason = ""
        self._runtime, self._signals = runtime, signals
        self._folder: RunFolder | None = None
        self._polled_at = 0.0
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def heed(self, folder: RunFolder) -> None:
        """From now on the STOP file of this run folder is a request too, and so is its loss to
        another trainer: the folder is ours."""
        self._folder = folder

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
        if answer:
            self.reason = self.reason or "another rank was asked to stop"
        return answer

    def agreed_now(self) -> bool:
        """True on every rank when any of them has seen a request. Waits for all ranks."""
        self.settle()
        answer = self._runtime.any_rank(self._requested())
        if answer:
            self.reason = self.reason or "another rank was asked to stop"
        return answer

    def settle(self) -> None:
        """Wait for the last message between the ranks: every rank has sent its part."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def _requested(self) -> bool:
        self.reason = self.reason or self._signals.reason
        if not self.reason and self._runtime.is_main and self._folder is not None:
            now = time.monotonic()
            if now - self._polled_at >= FILE_POLL_S:
                self._polled_at = now
                if _exists(self._folder.stop_path):
                    self.reason = f"{self._folder.stop_path} exists"
                elif self._folder.is_taken_over():
                    self.reason = "another trainer has taken over the run folder"
        return bool(self.reason)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a file system that is away for a while asks for nothing
        return False
