"""Writes the shards of a plan, several at a time, each all or nothing.

In: a source, a plan, a work folder. Out: in `<work>/<split>/` for each shard the tar, its offsets
`.tar.idx`, and a report `<work>/reports/<shard>.json`. The tar is renamed into place last: a shard
that is there is whole, so a killed `pack` repeats only the shards that it was writing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import MASK_MEMBER
from vae_dist.data.index import index_shard, write_sidecar
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.writer import ShardWriter
from vae_dist.files import sync_folder, write_durably
from vae_dist.packing.items import MAX_FILE_BYTES, Item, Source
from vae_dist.packing.picture import Picture, PictureSettings, prepare
from vae_dist.packing.plan import Plan, PlannedShard

POLL_SECONDS = 0.2
MAX_SIZES = 1000  # of different image sizes that a report lists
COUNTED = ("sizes", "channels", "labels", "members")  # of the samples of a shard

Progress = Callable[[int], None]  # pictures done


@dataclass
class Writing:
    """What each process that writes shards knows; handed over by fork."""

    source: Source
    plan: Plan
    work: Path
    settings: PictureSettings
    done: Any = None  # shared counter of pictures


def report_path(work: Path, shard: PlannedShard) -> Path:
    return work / "reports" / f"{shard.name}.json"


def is_written(work: Path, shard: PlannedShard) -> bool:
    """Whether a shard is whole, in the work folder or where `pack` moved its split in the end."""
    inner = Path(shard.split) / shard.name
    return (work / inner).exists() or (work.parent / inner).exists()


def write_missing(
    writing: Writing, numbers: Sequence[int], *, workers: int, progress: Progress
) -> None:
    """Write those shards of the plan, by number, that are not there yet.

    Raises ConfigError when they cannot be written.
    """
    plan, work = writing.plan, writing.work
    for folder in ("reports", "tmp", *plan.splits):
        (work / folder).mkdir(parents=True, exist_ok=True)
    missing = [n for n in numbers if not is_written(work, plan.shards[n])]
    before = sum(len(plan.shards[n].items) for n in numbers)
    before -= sum(len(plan.shards[n].items) for n in missing)
    progress(before)
    try:
        if min(workers, len(missing)) > 1:
            _write_in_processes(writing, missing, workers, lambda done: progress(before + done))
            return
        done = before
        for number in missing:
            for count in _write_shard(writing, plan.shards[number]):
                done += count
                progress(done)
    except (OSError, BrokenProcessPool) as error:
        raise ConfigError(
            f"out={work.parent}: the shards cannot be written ({error}); the same command goes on "
            "from the shards that are done"
        ) from error


def _write_in_processes(
    writing: Writing, numbers: list[int], workers: int, progress: Progress
) -> None:
    context = multiprocessing.get_context("fork")  # the plan is shared, not sent
    writing.done = context.Value("q", 0)
    with ProcessPoolExecutor(
        min(workers, len(numbers)), context, _start_worker, (writing, os.getpid())
    ) as pool:
        waiting = {pool.submit(_write_number, number) for number in numbers}
        try:
            while waiting:
                finished, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                for future in finished:
                    future.result()
                progress(writing.done.value)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_writing: Writing | None = None  # in a worker process


def _start_worker(writing: Writing, parent: int) -> None:
    global _writing
    _writing = writing

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _write_number(number: int) -> None:
    assert _writing is not None
    for count in _write_shard(_writing, _writing.plan.shards[number]):
        with _writing.done.get_lock():
            _writing.done.value += count


def _write_shard(writing: Writing, shard: PlannedShard) -> Iterator[int]:
    """Write one shard; yields 1 for each picture."""
    work = writing.work
    partial = work / "tmp" / f"{shard.name}.{os.uname().nodename}.{os.getpid()}"
    report: dict[str, Any] = {"samples": 0, "kept": 0, "skipped": [], "names": []}
    counts: dict[str, Counter[str]] = {key: Counter() for key in COUNTED}
    writer = ShardWriter(partial)
    try:
        for i, item in enumerate(shard.items):
            try:
                picture, members = _packed(writing, item)
            except DamagedSampleError as error:
                report["skipped"].append([item.name, str(error)])
                yield 1
                continue
            writer.write(
                {"__key__": f"{shard.first + i:09d}", picture.suffix: picture.data, **members}
            )
            report["names"].append(item.name)
            report["samples"] += 1
            report["kept"] += picture.kept
            counts["sizes"][f"{picture.shape[1]}x{picture.shape[2]}"] += 1
            counts["channels"][str(picture.shape[0])] += 1
            counts["labels"].update([str(item.category)] if "cls" in members else [])
            counts["members"].update(members.keys())
            yield 1
        writer.close()
        counts["sizes"] = Counter(dict(counts["sizes"].most_common(MAX_SIZES)))
        report |= {key: dict(count) for key, count in counts.items()}
        target = work / shard.split / shard.name
        write_durably(report_path(work, shard), json.dumps(report).encode())
        write_sidecar(target, index_shard(partial))
        os.replace(partial, target)
        sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _packed(writing: Writing, item: Item) -> tuple[Picture, dict[str, bytes]]:
    """The picture of a sample and its other members. Raises DamagedSampleError."""
    suffix, data = writing.source.read(item)
    members = {member: _companion(writing.source, member, file) for member, file in item.companions}
    picture = prepare(suffix, data, writing.settings, mask=members.get(MASK_MEMBER))
    if picture.mask is not None:
        members[MASK_MEMBER] = picture.mask
    if item.category is not None:
        members["cls"] = str(item.category).encode()
    if item.extra:
        members["json"] = _with_extra(members.get("json"), item.extra)
    return picture, members


def _companion(source: Source, member: str, file: Item) -> bytes:
    if file.num_bytes > MAX_FILE_BYTES:
        raise DamagedSampleError(f"its .{member} is too large")
    try:
        return source.read(file)[1]
    except DamagedSampleError as error:
        raise DamagedSampleError(f"its .{member}: {error}") from None


def _with_extra(text: bytes | None, extra: dict[str, Any]) -> bytes:
    """The .json of a sample with what a table says of it."""
    try:
        fields = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise DamagedSampleError("its .json has no fields; labels= could not add its own")
    return json.dumps({**fields, **extra}, sort_keys=True).encode()
