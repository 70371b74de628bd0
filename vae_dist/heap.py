"""What the C library does with memory that is free again.

A step on the CPU takes the memory of its feature maps and gives it back, thousands of pages each
time. By its defaults glibc hands large pieces to the kernel at once, which clears each page before
anyone gets it again: a tenth of a step of small images, a third where single maps exceed 32 MiB
(benchmarks/RESULTS.md). The next step wants the same pieces, so the process keeps them.

A small piece that stays can take the place of a large one, which then needs fresh memory: one that
outlives each of a hundred steps made 260 MiB 10 GiB in a trial, though no training did. So what is
kept is let go at times: after an evaluation, and before loader processes begin, which inherit it.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
# glibc's own values, the thresholds those that it comes to by itself where pieces are large
OF_GLIBC = {M_TRIM_THRESHOLD: 64 * 2**20, M_MMAP_THRESHOLD: 32 * 2**20, M_MMAP_MAX: 65536}
SETTINGS = ("trim_threshold", "mmap_threshold", "mmap_max", "top_pad")
VARIABLES = tuple(f"MALLOC_{name.upper()}_" for name in SETTINGS)

_keeps = False


def environment_decides() -> bool:
    told = os.environ.get("GLIBC_TUNABLES", "")
    return any(name in os.environ for name in VARIABLES) or any(
        f"glibc.malloc.{name}=" in told for name in SETTINGS
    )


def keep_freed_memory() -> None:
    """From now on freed memory stays with this process, for its own later use.

    An environment that has one of glibc's own SETTINGS is left alone; other C libraries and
    allocators (musl, a preloaded jemalloc) and other systems take no notice.
    """
    global _keeps
    mallopt = _function("mallopt")
    if mallopt is None or environment_decides():
        return
    mallopt(M_TRIM_THRESHOLD, -1)  # never give the end of the heap back
    mallopt(M_MMAP_MAX, 0)  # nor take large pieces as mappings of their own
    _keeps = True


def release_freed_memory() -> None:
    """Give back what is kept and not in use. What is freed later is kept again."""
    trim = _function("malloc_trim")
    if _keeps and trim is not None:
        trim(0)


def stop_keeping() -> None:
    """In a process that came of one that keeps: do as glibc does. A loader process would hold for
    ever what its largest image took."""
    global _keeps
    mallopt = _function("mallopt")
    if _keeps and mallopt is not None:
        for parameter, value in OF_GLIBC.items():
            mallopt(parameter, value)
    _keeps = False


def _function(name: str) -> ctypes._NamedFuncPointer | None:
    """Of this process's C library, where it is there."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
