"""Checkpoints in the background: training waits for a copy in memory, not for the disk.

In: tensors and state of a step, on the main process. Out: a folder, some time later. At most one
write is under way, so that memory is bounded and a kill costs at most the interval before it. The
copies lie in buffers that are kept from save to save (one more copy of the state in host memory,
pinned where it comes from a GPU): getting fresh memory would cost more than the copy. The writing
thread gives way to training where cores are few. A disk that does not take a checkpoint (full,
read-only, gone) costs a warning: the run goes on, the checkpoints before it stay, and the next one
tries again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vae_dist.run.checkpoint import Checkpoints, Tensors, step_name
from vae_dist.training.guard import TrainingFailed

BACKGROUND_NICE = 10  # a tenth of a core where training wants all of them
TAKEN_OVER = (
    "another trainer has taken over the run folder, because this one had shown no sign of life; "
    "this one ends here and leaves it alone"
)
PATIENCE_S = 120.0  # that training waits for the write before


class CheckpointWriter:
    """`submit` returns after the copy; `wait` returns when the disk has it, or has refused."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        keep_last: int,
        warn: Callable[[str], None],
        is_taken_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self.checkpoints, self.keep_last = checkpoints, keep_last
        self._is_taken_over = is_taken_over  # the folder, by another trainer
        self.stall_s = 0.0  # that training has waited for checkpoints since the start
        self.written_step = -1  # of the newest checkpoint that is on the disk
        self.failures = 0
        self.problem = ""  # of the last write, empty when it went well
        self._warn = warn
        self._thread: threading.Thread | None = None
        self._is_late = False  # training has waited for it long enough
        self._unforeseen: BaseException | None = None
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}

    def submit(
        self,
        step: int,
        tensors: Mapping[str, Tensors],
        state: Mapping[str, Any],
        *,
        best_step: int | None,
        urgent: bool = False,
    ) -> None:
        """Copy what is given and write it in a thread, after the write before it.

        Where that one hangs on its disk this one is left out, with a warning, unless it is
        `urgent`: then nothing goes on beside it, and there may be a grace time.
        """
        begun = time.perf_counter()
        if self._hangs(0.0 if self._is_late else PATIENCE_S) and not urgent:
            self._warn(
                f"warning: the disk of {self.checkpoints.folder} has not taken the checkpoint "
                f"before this one yet; {step_name(step)} is left out, training goes on"
            )
            self._is_late = True
            self.stall_s += time.perf_counter() - begun
            return
        self.wait()
        self._is_late = False
        arguments = (step, self._copied(tensors), dict(state), best_step, urgent)
        # no daemon: a process that ends on its own ends with this write done
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()
        self.stall_s += time.perf_counter() - begun

    def _copied(self, tensors: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """The tensors in this writer's buffers; waits once for the device, not for each tensor."""
        sources = {(name, key): v.detach() for name, g in tensors.items() for key, v in g.items()}
        for place, source in sources.items():
            buffer = self._buffers.get(place)
            if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
                self._buffers[place] = torch.empty(
                    source.shape, dtype=source.dtype, pin_memory=source.is_cuda
                )
        buffers = [self._buffers[place] for place in sources]
        is_on_cuda = any(source.is_cuda for source in sources.values())
        if buffers:
            torch._foreach_copy_(buffers, list(sources.values()), non_blocking=is_on_cuda)
        if is_on_cuda:
            torch.cuda.current_stream().synchronize()
        copies: dict[str, Tensors] = {name: {} for name in tensors}
        for (name, key), buffer in zip(sources, buffers, strict=True):
            copies[name][key] = buffer
        return copies

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

    def _hangs(self, patience_s: float) -> bool:
        """Whether a write is still under way after that time."""
        if self._thread is None:
            return False
        self._thread.join(patience_s)
        return self._thread.is_alive()

    def poll(self) -> None:
        """Say at once, not at the next checkpoint, that a write has failed."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def _write(
        self,
        step: int,
        tensors: dict[str, Tensors],
        state: dict[str, Any],
        best_step: int | None,
        urgent: bool,
    ) -> None:
        if not urgent:
            with contextlib.suppress(OSError):  # Linux: of this thread alone
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICE)
        try:
            if self._is_taken_over():
                raise TrainingFailed(TAKEN_OVER)
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
