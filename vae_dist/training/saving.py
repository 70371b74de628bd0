"""Checkpoints in the background: training waits for a copy in memory, not for the disk.

In: tensors and state of a step, on the main process. Out: a folder, some time later. At most one
write is under way, so that memory is bounded and a kill costs at most the interval before it. A
disk that does not take a checkpoint (full, read-only, gone) costs a warning: the run goes on, the
checkpoints before it stay, and the next one tries again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from vae_dist.checkpoint import Checkpoints, Tensors, step_name


class CheckpointWriter:
    """`submit` returns after the copy; `wait` returns when the disk has it, or has refused."""

    def __init__(
        self, checkpoints: Checkpoints, *, keep_last: int, warn: Callable[[str], None]
    ) -> None:
        self.checkpoints, self.keep_last = checkpoints, keep_last
        self.stall_s = 0.0  # that training has waited for checkpoints since the start
        self.written_step = -1  # of the newest checkpoint that is on the disk
        self.failures = 0
        self.problem = ""  # of the last write, empty when it went well
        self._warn = warn
        self._thread: threading.Thread | None = None
        self._unforeseen: BaseException | None = None

    def submit(
        self,
        step: int,
        tensors: Mapping[str, Tensors],
        state: Mapping[str, Any],
        *,
        best_step: int | None,
    ) -> None:
        """Copy what is given and write it in a thread, after the write before it."""
        begun = time.perf_counter()
        self.wait()
        copies = {
            name: {key: value.detach().to("cpu", copy=True) for key, value in group.items()}
            for name, group in tensors.items()
        }
        arguments = (step, copies, dict(state), best_step)
        # no daemon: a process that ends on its own ends with this write done
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()
        self.stall_s += time.perf_counter() - begun

    def wait(self) -> bool:
        """Until the write under way is done; whether the last one went well. Warns otherwise."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._unforeseen is not None:
                raise self._unforeseen
            if self.problem:
                self._warn(self._words())
        return not self.problem

    def poll(self) -> None:
        """Say at once, not at the next checkpoint, that a write has failed."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def _write(
        self, step: int, tensors: dict[str, Tensors], state: dict[str, Any], best_step: int | None
    ) -> None:
        try:
            self.checkpoints.save(
                step, tensors, state, keep_last=self.keep_last, best_step=best_step
            )
        except OSError as error:
            self.failures += 1
            self.problem = f"checkpoint {step_name(step)}: {error.strerror or error}"
        except BaseException as error:
            self._unforeseen = error
        else:
            self.written_step, self.problem = step, ""

    def _words(self) -> str:
        last = self.written_step
        safe = f"the last good one is {step_name(last)}" if last >= 0 else "there is none before it"
        return f"warning: cannot write {self.problem}; {safe}; training goes on"
