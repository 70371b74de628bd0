"""Runs work in loader processes, or in this one, with one meaning for both.

In: `work(worker, num_workers)`, an iterator of shares. Out: the shares, worker by worker in turn:
worker 0's first, worker 1's first, ..., worker 0's second, ...
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vae_dist.config.errors import CommandFailed, ConfigError

Work = Callable[[int, int], Iterator[Any]]
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
PREFETCHED = 2  # shares that each worker prepares ahead


class LoaderDied(CommandFailed):
    """A loader process was ended from outside, or by a fault that Python knows nothing of."""


@contextlib.contextmanager
def deaths_explained(remedy: str) -> Iterator[None]:
    """Around all that goes on beside loader processes: torch's handler of SIGCHLD raises the news
    wherever the main thread happens to be. Raises LoaderDied, with what to do."""
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


class WorkerPool:
    """Iterates over the shares of `num_workers` processes; 0 works in this process.

    Raises what `work` raises, and what `deaths_explained` explains.
    """

    def __init__(self, work: Work, *, num_workers: int) -> None:
        self.num_workers = num_workers
        self._work = work
        self._iterator: Any = None

    def __iter__(self) -> Iterator[Any]:
        if self.num_workers == 0:
            yield from self._work(0, 1)
            return
        loader = DataLoader(
            _Work(self._work),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=PREFETCHED,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        self._iterator = iter(loader)
        try:
            while self._iterator is not None:
                share = next(self._iterator, None)
                if share is None:
                    return
                if isinstance(share, ConfigError):
                    raise share
                yield share
        finally:
            self.close()

    def close(self) -> None:
        """End the workers. The loader's iterator would do so when the last reference to it goes,
        but a traceback may hold one, and processes that ignore SIGTERM keep the trainer."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()


class _Work(IterableDataset[Any]):
    def __init__(self, work: Work) -> None:
        self.work = work

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        try:
            yield from self.work(info.id, info.num_workers)
        except ConfigError as error:
            yield error  # as a value: raised here it would arrive wrapped in a traceback


def _as_it_is(share: Any) -> Any:
    return share


def _start_worker(worker: int) -> None:
    """Signals that stop a run go to whole process groups; only the trainer answers to them.

    A worker lives until its trainer closes it, or dies. Of the latter DataLoader's watchdog hears
    only between two shares: a worker whose share nobody reads waits for ever. So the kernel tells.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
