"""Jobs that write the shards of a folder: resumable, by any number of processes, without locks.

In: the folder, and all that decides the bytes of its shards. Out: in the folder, the shards with
their offsets `.tar.idx`, and a summary. The state of a job is its files alone:

    OUT/.job/plan.json    what decides the bytes: another command may not go on here
    OUT/.job/SHARD.json   what is in a shard
    OUT/SHARD             a shard; written as a partial file and renamed: it is there or not
    OUT/SUMMARY           written last; then .job is removed

Shards are not claimed: processes take the shards k with k mod n = i, and two that write the same
one write the same bytes. The process that finds all shards there writes the summary.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch.multiprocessing import ProcessExitedException, start_processes

from vae_dist.config.commands import EncodeCommand, PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.data.index import index_shard, write_sidecar
from vae_dist.data.shards import WORK
from vae_dist.data.writer import ShardWriter
from vae_dist.files import printable, read_json, sync_folder, write_durably

Report = dict[str, Any]  # JSON

MIN_PER_SHARD = 128  # samples
POLL_SECONDS = 0.2
NUM_NAMED = 5  # images that a message names
MAX_SHOWN = 80  # characters of two values that differ; digests are longer
MAX_JSON_BYTES = 1 << 32  # of a report or summary, which lists what is in its shards


@dataclass(frozen=True)
class ShardJob:
    """What a command writes."""

    out: Path
    summary: str  # its name there
    identity: dict[str, Any]  # what decides the bytes of the shards; JSON

    @property
    def work(self) -> Path:
        return self.out / WORK

    def is_finished(self) -> bool:
        """Whether the summary is there. Raises ConfigError where another job made it, and where the
        folder holds something else."""
        path = self.out / self.summary
        if path.exists():
            self._check_same(self._read(path).get("identity", {}), self.identity)
            shutil.rmtree(self.work, ignore_errors=True)
            return True
        is_used = self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir()))
        if is_used and not self.work.exists():
            raise ConfigError(f"out={self.out}: in use; give another folder, or empty it")
        return False

    def begin(self, **plan: Any) -> None:
        """Write down what decides the bytes of the shards, or find the same there. Raises
        ConfigError where another job was begun, or nothing can be written."""
        path, plan = self.work / "plan.json", {**self.identity, **plan}
        with self.writing():
            self.work.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_durably(path, json.dumps(plan, indent=1).encode())
            begun = self._read(path)  # of two that begin at once the later one's
        self._check_same(begun, plan)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raises ConfigError for what the disk refuses, or where another process ended the job."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"out={self.out}: cannot be written ({error}); the same command goes on from the "
                "shards that are done"
            ) from error

    def is_done(self, shard: str) -> bool:
        return (self.out / shard).exists()

    @contextlib.contextmanager
    def shard(self, name: str) -> Iterator[tuple[ShardWriter, Report]]:
        """A shard to write and a report to fill; it bears its name when the block ends well. Raises
        ConfigError for what the disk refuses."""
        target, report = self.out / name, Report()
        partial = self.work / f"{target.name}.{os.uname().nodename}.{os.getpid()}"
        with self.writing():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with contextlib.closing(ShardWriter(partial)) as writer:
                    yield writer, report
                write_durably(self.work / f"{target.name}.json", json.dumps(report).encode())
                write_sidecar(target, index_shard(partial))
                os.replace(partial, target)
                sync_folder(target.parent)
            finally:
                partial.unlink(missing_ok=True)

    def report(self, shard: str) -> Report:
        return self._read(self.work / f"{Path(shard).name}.json")

    def finish(self, summary: Report) -> None:
        text = json.dumps({**summary, "identity": self.identity}, indent=1) + "\n"
        write_durably(self.out / self.summary, text.encode())
        shutil.rmtree(self.work, ignore_errors=True)

    def _read(self, path: Path) -> Report:
        try:
            return dict(read_json(path, MAX_JSON_BYTES))
        except ValueError as error:
            raise ConfigError(f"out={self.out}: {error}; remove the folder") from None

    def _check_same(self, theirs: Report, mine: Report) -> None:
        differ = {
            key: f" ({shown(theirs.get(key))} there, {shown(value)} here)"
            for key, value in json.loads(json.dumps(mine)).items()
            if theirs.get(key) != value
        }
        if differ:
            texts = [f"other {k}{v if len(v) < MAX_SHOWN else ''}" for k, v in differ.items()]
            raise ConfigError(
                f"out={self.out}: made with {', '.join(texts)}; repeat that command on the same "
                "input, or remove the folder to begin anew"
            )


def cut(num_samples: int, num_shards: int, *, at_least: int) -> list[tuple[int, int]]:
    """(first, stop) of shards of equal numbers of samples, give or take one. at_least: so many, for
    as many processes, where each has MIN_PER_SHARD samples."""
    num_shards = max(num_shards, min(at_least, num_samples // MIN_PER_SHARD), 1)
    num_shards = min(num_shards, num_samples)
    return list(pairwise(num_samples * k // num_shards for k in range(num_shards + 1)))


def check_lost(
    command: PackCommand | EncodeCommand, key: str, lost: Sequence[str], *, total: int
) -> None:
    """Raises ConfigError when all images of the key `source` or `data` cannot be read, or more than
    max_skipped_fraction of them."""
    limit = command.max_skipped_fraction
    if len(lost) == total or len(lost) > limit * total:
        raise ConfigError(
            [
                f"{key}={shown(getattr(command, key))}: {len(lost)} of {total} images cannot be "
                f"read; repair them, or raise max_skipped_fraction={limit:g}",
                *(f"  {text}" for text in lost[:NUM_NAMED]),
            ]
        )


def print_left_out(left_out: Sequence[str], *, summary: Path) -> None:
    more = [f"{len(left_out)} in all, listed in {summary}"] * (len(left_out) > NUM_NAMED)
    for text in [*left_out[:NUM_NAMED], *more]:
        print(f"left out: {printable(text)}", file=sys.stderr)


def run(
    write: Callable[[str], None],
    shards: Sequence[str],
    *,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Have the shards written by forks of this process, which end with it. Raises the ConfigError
    of one, also where it is killed."""
    context, workers = multiprocessing.get_context("fork"), min(workers, len(shards))
    done, errors = context.Value("q", 0), context.SimpleQueue()

    def work(worker: int) -> None:
        try:
            for shard in shards[worker::workers]:
                write(shard)
                with done.get_lock():
                    done.value += 1
        except ConfigError as error:
            errors.put(error)

    forks = start_processes(work, nprocs=workers, join=False, daemon=True, start_method="fork")
    try:
        while errors.empty() and not forks.join(POLL_SECONDS):
            progress(done.value)
    except ProcessExitedException as error:
        raise ConfigError(
            f"a process that writes shards ended ({error}); killed ones mostly lack memory: ask "
            "for fewer workers; the same command goes on"
        ) from None
    finally:
        for process in forks.processes:
            process.terminate()
            process.join()
    if not errors.empty():
        raise errors.get()
