"""A stop on which all ranks agree: SIGTERM, SIGUSR1, Ctrl-C or a STOP file, seen by any of them.

Handlers only set a flag. At each step the ranks reduce their flags and act on the result one step
later, so that no rank waits for this message: all stop after the same step.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from vae_dist.runtime import Runtime

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FILE_POLL_S = 1.0


class StopRequest:
    """Use as a context manager around training; `agreed()` once per step on every rank."""

    def __init__(self, runtime: Runtime, stop_file: Path) -> None:
        self.reason = ""
        self._runtime = runtime
        self._stop_file = stop_file
        self._polled_at = 0.0
        self._previous: dict[signal.Signals, object] = {}
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._pending is not None and exception[0] is None:
            self._pending[0].wait()  # every rank has sent its part
            self._pending = None

    def agreed(self) -> bool:
        """True on every rank after the same call, one call after the first rank saw a request."""
        if self._runtime.world == 1:
            return self._requested()
        answer = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor(int(self._requested()), device=self._runtime.device)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = (work, flag)
        if answer:
            self.reason = self.reason or "another rank was asked to stop"
        return answer

    def _requested(self) -> bool:
        if not self.reason and self._runtime.is_main:
            now = time.monotonic()
            if now - self._polled_at >= FILE_POLL_S:
                self._polled_at = now
                if self._stop_file.exists():
                    self.reason = f"{self._stop_file} exists"
        return bool(self.reason)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason:  # asked twice: at once; checkpoints are replaced atomically
            os._exit(128 + number)
        self.reason = f"signal {signal.Signals(number).name}"
