"""Signals that ask a run to stop: caught from the first line of the command on, and counted.

In: SIGTERM, SIGUSR1 and SIGINT of this process, and the life of the launcher that started it. Out:
`reason`, for the loop to act on at a step. A launcher that is killed passes nothing on, and its
processes would train on, unknown to whoever starts the command again.

A second request ends the process at once; checkpoints are replaced atomically, so none is harmed.
Schedulers and elastic agents deliver one request several times (to the process, to its group, from
the agent again), so what follows within BURST_S is the same request.

Python runs its handlers between bytecodes of the main thread, which may be inside a collective that
never ends. So the requests are counted by a thread, which the interpreter's C handler wakes up.
No torch is imported here.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
BURST_S = 2.0
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: run the same command again
_LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate.commands.launch")


class StopSignals:
    """Use as a context manager on the main thread; `reason` is empty until the first signal."""

    def __init__(self) -> None:
        self._reason = ""
        self.exits_at_once = False  # while this process waits in C++ and has nothing to save
        self._launcher: int | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._previous_descriptor = -1
        self._reader = self._writer = -1

    @property
    def reason(self) -> str:
        if not self._reason and self._launcher not in (None, os.getppid()):
            self._reason = f"the launcher, process {self._launcher}, is gone"
        return self._reason

    def __enter__(self) -> StopSignals:
        self._launcher = _launcher()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)  # as set_wakeup_fd wants it
        threading.Thread(target=self._count, name="stop-signals", daemon=True).start()
        self._previous_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
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
        """In a thread: the first signal, its burst, and the end of the process at the next one."""
        first_s: float | None = None
        while (number := os.read(self._reader, 1)[0]) != 0:
            if number not in SIGNALS:
                continue
            if self.exits_at_once:
                name = signal.Signals(number).name
                print(f"interrupted before training (signal {name})", file=sys.stderr, flush=True)
                os._exit(EXIT_INTERRUPTED)
            if first_s is None:
                first_s = time.monotonic()
            elif time.monotonic() - first_s > BURST_S:
                os._exit(128 + number)
        os.close(self._reader)


def _launcher() -> int | None:
    """The parent process where it is a launcher, which outlives what it starts. Others may leave:
    a shell goes with its ssh session while the run stays under nohup."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return parent
    import psutil  # `--help` and wrong configs need none

    try:  # `accelerate launch` of one process has no elastic agent
        command = psutil.Process(parent).cmdline()
    except psutil.Error:
        return None
    return parent if any(os.path.basename(word) in _LAUNCHERS for word in command[:4]) else None
