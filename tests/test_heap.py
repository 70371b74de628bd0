"""Freed memory stays with a process that asked for it: the kernel counts the pages it hands out."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vae_dist.config.schema import RuntimeConfig
from vae_dist.data.workers import WorkerPool
from vae_dist.distributed import Runtime
from vae_dist.heap import keep_freed_memory

PAGES_OF_A_PIECE = 8448  # 33 MiB: more than glibc's own limit for pieces of its heap
TAKE_AND_FREE = """
import resource
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for byte in (b"1", b"2"):
    before = faults()
    byte * (33 * 2**20)
    pages = faults() - before
    globals().get("between", int)()
"""

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="this C library is not glibc, whose malloc it is"
)


def new_pages(ask: str, **environment: str) -> int:
    """Pages that a process gets from the kernel for pieces as large as those that it just freed."""
    clean = {name: value for name, value in os.environ.items() if "MALLOC_" not in name}
    clean.pop("GLIBC_TUNABLES", None)
    command = [sys.executable, "-c", f"{ask}\n{TAKE_AND_FREE}print(pages)"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


HEAP = "from vae_dist.heap import keep_freed_memory, release_freed_memory, stop_keeping\n"
KEEP = f"{HEAP}keep_freed_memory()"


def test_freed_memory_stays():
    assert new_pages(HEAP) > 0.9 * PAGES_OF_A_PIECE
    assert new_pages(KEEP) < 0.01 * PAGES_OF_A_PIECE


def test_what_is_kept_can_be_let_go():
    assert new_pages(f"{KEEP}\nbetween = release_freed_memory") > 0.9 * PAGES_OF_A_PIECE
    assert new_pages(f"{KEEP}\nstop_keeping()") > 0.9 * PAGES_OF_A_PIECE


def test_a_loader_process_keeps_nothing():
    keep_freed_memory()

    def work(worker: int, num_workers: int) -> Iterator[int]:
        found: dict[str, int] = {}
        exec(TAKE_AND_FREE, found)
        yield found["pages"]

    pool = WorkerPool(work, num_workers=1)
    (pages,) = pool
    assert pages > 0.9 * PAGES_OF_A_PIECE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "1000000"),
        ("GLIBC_TUNABLES", "glibc.rtld.nns=4:glibc.malloc.mmap_max=65536"),
    ],
)
def test_settings_of_the_environment_stand(name, value):
    assert new_pages(KEEP, **{name: value}) > 0.9 * PAGES_OF_A_PIECE


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")]
)
def test_settings_of_other_things_do_not_count(name, value):
    assert new_pages(KEEP, **{name: value}) < 0.01 * PAGES_OF_A_PIECE


def test_training_on_a_cpu_asks_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr("vae_dist.distributed.keep_freed_memory", lambda: asked.append(True))
    Runtime.start(RuntimeConfig(device="cpu", threads=1), precision="no")
    assert asked == [True]
