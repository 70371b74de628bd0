"""Jobs that write the shards of a folder: resumable, by any number of processes, without locks.

In: the folder, and all that decides the bytes of its shards. Out: in the folder, the shards with
their offsets `.tar.idx`, and a summary. The state of a job is its files alone:

    OUT/.job/plan.json            what decides the bytes: another command may not go on here
    OUT/.job/reports/SHARD.json   what is in a shard
    OUT/SHARD                     a shard; written as a partial file and renamed: it is there or not
    OUT/SUMMARY                   written last; then .job is removed

Shards are not claimed: processes take the shards k with k mod n = i, and two that
write the same one write the same bytes. The process that finds all shards there writes the summary.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.data.indexing import index_shard, write_sidecar
from vae_dist.data.shards import WORK
from vae_dist.data.writer import ShardWriter
from vae_dist.files import sync_folder, write_durably

Part = tuple[int, int]  # (i, n): of n processes the i-th, which writes the shards k = i modulo n
S = TypeVar("S")
T = TypeVar("T")
Report = dict[str, Any]  # JSON

POLL_SECONDS = 0.2
NUM_NAMED = 5  # images that a message names
MAX_SHOWN = 80  # characters of two values that differ; digests are longer


def part_of(text: str, *, key: str) -> Part:
    """The part that "i/n" means. Raises ConfigError, which blames `key`."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(f"{key}={text} is not i/n with 0 <= i < n, like 0/8")
    return int(found[1]), int(found[2])


class FinishedElsewhere(Exception):
    """Another process has written all shards and the summary; nothing is left to do."""


@dataclass(frozen=True)
class ShardJob:
    """The folder that a command writes, and the name of its summary there."""

    out: Path
    summary: str

    @property
    def work(self) -> Path:
        return self.out / WORK

    def finished(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The summary of a finished job, None where there is none yet.

        Raises ConfigError where it was made with another `identity`, and where the folder holds
        something else.
        """
        path = self.out / self.summary
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            self._check_same(found.get("identity", {}), identity)
            shutil.rmtree(self.work, ignore_errors=True)
            return found
        is_free = not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir()))
        if not is_free and not self.work.exists():
            raise ConfigError(
                f"out={self.out}: the folder is in use; give another one, or empty it"
            )
        return None

    def begin(self, plan: dict[str, Any]) -> None:
        """Write down what decides the bytes of the shards, or find the same there. Raises
        ConfigError where another job was begun, or nothing can be written."""
        path = self.work / "plan.json"
        with self._writing():
            for name in ("reports", "partial"):
                (self.work / name).mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_durably(path, json.dumps(plan, indent=1).encode())
            begun = json.loads(path.read_text())  # of two that begin at once the later one's
        self._check_same(begun, plan)

    def check_visible(self) -> None:
        """Raises ConfigError where what another node began is not there."""
        if not (self.work / "plan.json").exists():
            raise ConfigError(
                f"out={self.out}: is not the same folder on all nodes; choose one on a file system "
                "that all nodes see"
            )

    def is_done(self, shard: str) -> bool:
        return (self.out / shard).exists()

    @contextlib.contextmanager
    def shard(self, name: str) -> Iterator[tuple[ShardWriter, Report]]:
        """A shard to write and a report to fill; it bears its name when the block ends well. Raises
        FinishedElsewhere, and ConfigError for what the disk refuses."""
        target, host = self.out / name, os.uname().nodename
        partial = self.work / "partial" / f"{target.name}.{host}.{os.getpid()}"
        report: Report = {}
        with self._writing():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                writer = ShardWriter(partial)
                yield writer, report
                writer.close()
                write_durably(self._report_path(name), json.dumps(report).encode())
                write_sidecar(target, index_shard(partial))
                os.replace(partial, target)
                sync_folder(target.parent)
            finally:
                partial.unlink(missing_ok=True)

    def report(self, shard: str) -> Report:
        found: Report = json.loads(self._report_path(shard).read_text())
        return found

    def finish(
        self, identity: dict[str, Any], describe: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Have the summary made of the reports, and write it, unless another process did so."""
        try:
            summary = {**describe(), "identity": identity}
            with self._writing():
                write_durably(
                    self.out / self.summary, (json.dumps(summary, indent=1) + "\n").encode()
                )
        except FileNotFoundError:  # another process was quicker, and its reports are gone
            if (found := self.finished(identity)) is None:
                raise
            return found
        shutil.rmtree(self.work, ignore_errors=True)
        return summary

    def _report_path(self, shard: str) -> Path:
        return self.work / "reports" / f"{Path(shard).name}.json"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises ConfigError for what the disk refuses, FinishedElsewhere where .job is gone."""
        try:
            yield
        except FileNotFoundError:
            if not (self.out / self.summary).exists():
                raise
            raise FinishedElsewhere from None
        except OSError as error:
            raise ConfigError(
                f"out={self.out}: cannot be written ({error}); the same command goes on from the "
                "shards that are done"
            ) from error

    def _check_same(self, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
        mine = json.loads(json.dumps(mine))
        differs = [key for key in mine if theirs.get(key) != mine[key]]
        if differs:
            other = ", ".join(
                f"another {_in_short(key, theirs.get(key), mine[key])}" for key in differs
            )
            raise ConfigError(
                f"out={self.out}: made with {other}; give that command again, remove the folder, "
                "or choose another one"
            )


def _in_short(key: str, theirs: Any, mine: Any) -> str:
    values = f"{shown(theirs)} there, {shown(mine)} here"
    return f"{key} ({values})" if len(values) < MAX_SHOWN else key


# what is left out


def check_lost(lost: Sequence[str], *, of: str, total: int, max_skipped_fraction: float) -> None:
    """Raises ConfigError when more images cannot be read than that part of all."""
    if len(lost) > max_skipped_fraction * total:
        raise ConfigError(
            [
                f"{of}: {len(lost)} of {total} images cannot be read, more than "
                f"max_skipped_fraction={max_skipped_fraction:g}:",
                *(f"  {text}" for text in lost[:NUM_NAMED]),
                "repair them, or raise max_skipped_fraction and give the same command again",
            ]
        )


def print_left_out(left_out: Sequence[str], *, summary: Path) -> None:
    for text in left_out[:NUM_NAMED]:
        print(f"left out: {text}", file=sys.stderr)
    if (more := len(left_out) - NUM_NAMED) > 0:
        print(f"left out: {more} more, listed in {summary}", file=sys.stderr)


# several processes of one command

Count = Callable[[int], None]  # called with the number of samples done since the last call


def run(
    write: Callable[[str, Count], None],
    shards: Sequence[str],
    *,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Have the shards written, several at a time. `write` is handed over by fork, not sent.

    Raises what `write` raises, and ConfigError when a process is killed.
    """
    context = multiprocessing.get_context("fork")
    done = context.Value("q", 0)

    def count(number: int) -> None:
        with done.get_lock():
            done.value += number

    def count_and_show(number: int) -> None:
        count(number)
        progress(done.value)

    if min(workers, len(shards)) <= 1:
        for shard in shards:
            write(shard, count_and_show)
        return
    with ProcessPoolExecutor(
        min(workers, len(shards)), context, _start_worker, (write, count, os.getpid())
    ) as pool:
        waiting = {pool.submit(_run_in_worker, shard) for shard in shards}
        try:
            while waiting:
                finished, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                for future in finished:
                    future.result()
                progress(done.value)
        except BrokenProcessPool as error:
            raise ConfigError(
                f"a process that writes shards was killed ({error}), most often for memory: ask "
                "for fewer workers; the same command goes on"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker: tuple[Callable[[str, Count], None], Count]  # in a process of the pool


def _start_worker(write: Callable[[str, Count], None], count: Count, parent: int) -> None:
    global _worker
    _worker = write, count

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_in_worker(shard: str) -> None:
    write, count = _worker
    write(shard, count)


# several threads of one process


def in_threads(function: Callable[[S], T], items: Iterable[S], *, threads: int) -> Iterator[T]:
    """What `function` makes of the items, in their order, some ahead of who takes them."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
