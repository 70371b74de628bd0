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
import multiprocessing.connection
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vae_dist.config.commands import EncodeCommand, PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.data.indexing import index_shard, write_sidecar
from vae_dist.data.shards import WORK
from vae_dist.data.writer import ShardWriter
from vae_dist.files import printable, read_json, sync_folder, write_durably

Count = Callable[[int], None]  # called with the number of samples done since the last call
Report = dict[str, Any]  # JSON

MIN_PER_SHARD = 128  # samples
POLL_SECONDS = 0.2
NUM_NAMED = 5  # images that a message names
MAX_SHOWN = 80  # characters of two values that differ; digests are longer
MAX_JSON_BYTES = 1 << 32  # of a report or summary, which lists what is in its shards


class FinishedElsewhere(Exception):
    """Another process has written all shards and the summary; nothing is left to do."""


@dataclass(frozen=True)
class ShardJob:
    """The folder that a command writes, the name of its summary there, and what decides its
    bytes."""

    out: Path
    summary: str
    identity: dict[str, Any]  # JSON

    @property
    def work(self) -> Path:
        return self.out / WORK

    def finished(self) -> Report | None:
        """The summary of a finished job, None where there is none yet.

        Raises ConfigError where it was made by another job, and where the folder holds something
        else.
        """
        path = self.out / self.summary
        if path.exists():
            found = self._read(path)
            self._check_same(found.get("identity", {}), self.identity)
            shutil.rmtree(self.work, ignore_errors=True)
            return found
        is_free = not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir()))
        if not is_free and not self.work.exists():
            raise ConfigError(
                f"out={self.out}: the folder is in use; give another one, or empty it"
            )
        return None

    def begin(self, **plan: Any) -> None:
        """Write down what decides the bytes of the shards, or find the same there. Raises
        ConfigError where another job was begun, or nothing can be written."""
        path, plan = self.work / "plan.json", {**self.identity, **plan}
        with self._writing():
            for name in ("reports", "partial"):
                (self.work / name).mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_durably(path, json.dumps(plan, indent=1).encode())
            begun = self._read(path)  # of two that begin at once the later one's
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
        target, report = self.out / name, Report()
        partial = self.work / "partial" / f"{target.name}.{os.uname().nodename}.{os.getpid()}"
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
        return self._read(self._report_path(shard))

    def finish(self, describe: Callable[[], Report]) -> Report:
        """Have the summary made of the reports, and write it. Raises FinishedElsewhere."""
        with self._writing():
            summary = {**describe(), "identity": self.identity}
            text = json.dumps(summary, indent=1) + "\n"
            write_durably(self.out / self.summary, text.encode())
        shutil.rmtree(self.work, ignore_errors=True)
        return summary

    def _report_path(self, shard: str) -> Path:
        return self.work / "reports" / f"{Path(shard).name}.json"

    def _read(self, path: Path) -> Report:
        try:
            return dict(read_json(path, MAX_JSON_BYTES))
        except ValueError as error:
            raise ConfigError(f"out={self.out}: {error}; remove the folder") from None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises ConfigError for what the disk refuses, FinishedElsewhere where .job is gone."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and (self.out / self.summary).exists():
                raise FinishedElsewhere from None
            raise ConfigError(
                f"out={self.out}: cannot be written ({error}); the same command goes on from the "
                "shards that are done"
            ) from error

    def _check_same(self, theirs: Report, mine: Report) -> None:
        mine = json.loads(json.dumps(mine))
        differs = []
        for key in mine:
            if theirs.get(key) != mine[key]:
                values = f"{shown(theirs.get(key))} there, {shown(mine[key])} here"
                differs.append(f"another {key}" + f" ({values})" * (len(values) < MAX_SHOWN))
        if differs:
            raise ConfigError(
                f"out={self.out}: made with {', '.join(differs)}; give that command again, remove "
                "the folder, or choose another one"
            )


def cut(num_samples: int, num_shards: int, *, at_least: int) -> list[tuple[int, int]]:
    """(first, stop) of shards of equal numbers of samples, give or take one. at_least: so many, for
    as many processes, where each has MIN_PER_SHARD samples."""
    num_shards = max(num_shards, min(at_least, num_samples // MIN_PER_SHARD), 1)
    num_shards = min(num_shards, num_samples)
    return list(pairwise(num_samples * k // num_shards for k in range(num_shards + 1)))


# what is left out


def check_lost(
    command: PackCommand | EncodeCommand, key: str, lost: Sequence[str], *, total: int
) -> None:
    """Raises ConfigError when more images of the key `source` or `data` cannot be read than
    max_skipped_fraction of all."""
    if len(lost) > command.max_skipped_fraction * total:
        raise ConfigError(
            [
                f"{key}={shown(getattr(command, key))}: {len(lost)} of {total} images cannot be "
                f"read, more than max_skipped_fraction={command.max_skipped_fraction:g}:",
                *(f"  {text}" for text in lost[:NUM_NAMED]),
                "repair them, or raise max_skipped_fraction and give the same command again",
            ]
        )


def print_left_out(left_out: Sequence[str], *, summary: Path) -> None:
    for text in left_out[:NUM_NAMED]:
        print(f"left out: {printable(text)}", file=sys.stderr)
    if (more := len(left_out) - NUM_NAMED) > 0:
        print(f"left out: {more} more, listed in {summary}", file=sys.stderr)


# several processes of one command


def run(
    write: Callable[[str, Count], None],
    shards: Sequence[str],
    *,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Have the shards written by forks of this process. Raises ConfigError and FinishedElsewhere of
    `write`, and ConfigError when a process is killed."""
    context, parent = multiprocessing.get_context("fork"), os.getpid()
    done, errors = context.Value("q", 0), context.SimpleQueue()

    def count(number: int) -> None:
        with done.get_lock():
            done.value += number
        if os.getpid() == parent:
            progress(done.value)

    def work(shards: Sequence[str]) -> None:
        try:
            for shard in shards:
                if os.getppid() == parent:  # else it was killed, and none waits for this one
                    write(shard, count)
        except (ConfigError, FinishedElsewhere) as error:
            errors.put(error)
            sys.exit(1)
        except KeyboardInterrupt:  # the parent says so
            sys.exit(1)

    workers = min(workers, len(shards))
    if workers <= 1:
        for shard in shards:
            write(shard, count)
        return
    processes = [context.Process(target=work, args=(shards[i::workers],)) for i in range(workers)]
    for process in processes:
        process.start()
    running = list(processes)
    try:
        while running:
            multiprocessing.connection.wait([p.sentinel for p in running], POLL_SECONDS)
            progress(done.value)
            running = [process for process in processes if process.is_alive()]
            failed = [process.exitcode for process in processes if process.exitcode]
            if failed and not errors.empty():
                raise errors.get()
            if failed:
                raise ConfigError(
                    f"a process that writes shards ended with code {failed[0]}; killed ones (-9) "
                    "mostly lack memory: ask for fewer workers; the same command goes on"
                )
    finally:
        for process in processes:
            process.terminate()
            process.join()
