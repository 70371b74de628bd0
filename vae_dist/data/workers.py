"""Iterators in loader processes, or in this one, with one meaning for both.

In: `make_parts(worker, num_workers)`, an iterator of parts. Out: the parts, worker by worker in
turn: worker 0's first, worker 1's first, ..., worker 0's second, ...

Processes are forked, whatever Python's default is: what they need comes to them as it is, shared
memory too. That memory is anonymous and parts are pickled without tensors, so that nothing is taken
from /dev/shm, which is small in containers.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vae_dist.config.errors import CommandFailed, ConfigError

MakeParts = Callable[[int, int], Iterator[Any]]
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
PREFETCHED = 2  # parts that each worker prepares ahead


class LoaderDied(CommandFailed):
    """A loader process was ended from outside, or by a fault that Python knows nothing of."""


@contextlib.contextmanager
def deaths_explained(remedy: str) -> Iterator[None]:
    """Around whatever waits for loader processes. Raises LoaderDied, with what to do."""
    try:
        yield
    except RuntimeError as error:
        words = str(error).strip()
        if not words.startswith("DataLoader worker"):
            raise
        raise LoaderDied(
            f"a loader process died ({words.splitlines()[0].rstrip('. ')}). Memory that ran out is "
            f"the usual cause: {remedy}"
        ) from None


def shared_arrays(shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[np.ndarray]:
    """Memory for what the forks of a rank add to a step; step k has array k mod their number.

    DataLoader asks a worker for its part of step k + PREFETCHED + 1 when the trainer takes that of
    step k + 1, after it copied step k.
    """
    size = math.prod(shape) * dtype.itemsize
    buffers = [mmap.mmap(-1, size) for _ in range(PREFETCHED + 1)]
    return [np.frombuffer(buffer, dtype).reshape(shape) for buffer in buffers]


class WorkerPool:
    """Iterates over the parts of `num_workers` processes; 0: in this process.

    Raises what `make_parts` raises, and what `deaths_explained` explains.
    """

    def __init__(self, make_parts: MakeParts, *, num_workers: int) -> None:
        self.num_workers, self._make_parts = num_workers, make_parts
        self._iterator: Any = None

    def __iter__(self) -> Iterator[Any]:
        if self.num_workers == 0:
            yield from self._make_parts(0, 1)
            return
        loader = DataLoader(
            _Parts(self._make_parts),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=PREFETCHED,
            multiprocessing_context="fork",
            collate_fn=lambda part: part,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        handler = signal.getsignal(signal.SIGCHLD)
        self._iterator = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # torch's would raise amid an update, too; a wait for data learns of a death as well
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        try:
            while self._iterator is not None:
                part = next(self._iterator, None)
                if part is None:
                    return
                if isinstance(part, ConfigError):
                    raise part
                yield part
        finally:
            self.close()

    def close(self) -> None:
        """End the workers. The loader's iterator would do so when the last reference to it goes,
        but a traceback may hold one, and processes that ignore SIGTERM keep the trainer."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()


class _Parts(IterableDataset[Any]):
    def __init__(self, make_parts: MakeParts) -> None:
        self.make_parts = make_parts

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        try:
            yield from self.make_parts(info.id, info.num_workers)
        except ConfigError as error:
            yield error  # as a value: raised here it would arrive wrapped in a traceback


def _start_worker(worker: int) -> None:
    """Signals that stop a run go to whole process groups; only the trainer answers to them.

    A worker lives until its trainer closes it, or dies. Of the latter DataLoader's watchdog learns
    only between two parts: a worker whose part is not read waits for ever. So the kernel kills it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
