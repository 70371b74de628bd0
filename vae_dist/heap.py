"""What the C library does with memory that is free again.

A step on the CPU takes the memory of its feature maps and gives it back, thousands of pages each
time. By its defaults glibc hands large pieces to the kernel at once, which clears each page before
anyone gets it again: a tenth of a step of small images, a third where single maps exceed 32 MiB
(benchmarks/RESULTS.md). The next step wants the same pieces, so the process keeps them.
"""

from __future__ import annotations

import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
VARIABLES = tuple(
    f"MALLOC_{name}_" for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD", "MMAP_MAX", "TOP_PAD")
)


def keep_freed_memory() -> None:
    """From now on freed memory stays with this process, for its own later use.

    It holds as much as at its worst moment, and up to a sixth more that lies in gaps.
    An environment that sets glibc's malloc itself is left alone; other C libraries and allocators
    (musl, a preloaded jemalloc) and other systems take no notice.
    """
    told = os.environ.get("GLIBC_TUNABLES", "")
    is_set = "glibc.malloc" in told or any(name in os.environ for name in VARIABLES)
    if is_set or sys.platform != "linux":
        return
    import ctypes  # what imports this module has no need of it yet

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)  # never give the end of the heap back
        mallopt(M_MMAP_MAX, 0)  # nor take large pieces as mappings of their own
