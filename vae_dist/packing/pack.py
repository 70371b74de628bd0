"""Pictures of a source become shards: planned, written by several processes, checked, described.

In: the keys of `pack`. Out: the folder that `vae_dist.pack` describes. The plan (which picture goes
into which shard) depends on the source and the keys alone, so that a killed `pack` goes on where it
stopped and the jobs of an array agree. Raises ConfigError with a remedy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.data.decode import MASK_MEMBER, SUFFIXES
from vae_dist.data.indexing import write_info
from vae_dist.data.tar import DamagedSampleError, files_of_tar
from vae_dist.files import ProgressBar, write_durably
from vae_dist.packing import jobs, labels
from vae_dist.packing.items import (
    MAX_FILE_BYTES,
    Item,
    Listing,
    Named,
    one_line,
    read,
    shown_name,
    suffix_of,
)
from vae_dist.packing.jobs import Count, Report, ShardJob
from vae_dist.packing.picture import Picture, PictureSettings, prepare, thumbnail
from vae_dist.packing.sources import check_splits, list_source, numbered
from vae_dist.randomness import numpy_generator
from vae_dist.tracking.images import grid, save_png

NOT_OF_SHARDS = ("source", "labels", "out", "shard_range", "workers", "max_skipped_fraction")
SPLITS = ("train", "validation", "test")
MIN_SHARDS = 8  # of a split that has at least MIN_PER_SHARD pictures for each
MIN_PER_SHARD = 128
NUM_PROBED = 32  # pictures whose size in a shard is measured for the plan
MAX_SIZES = 1000  # of different image sizes that a report lists
COUNTED = ("sizes", "channels", "labels", "members", "notes")  # of the samples of a shard
SHEET, SHEET_PICTURES, SHEET_PIXELS = "contact-sheet.png", 64, 96


class PlannedShard(NamedTuple):
    split: str
    number: int  # in the split
    first: int  # number of its first picture in the split, for the keys
    items: list[Item]

    @property
    def name(self) -> str:
        return f"{self.split}/{self.split}-{self.number:06d}.tar"


def pack(command: PackCommand) -> None:
    settings = _picture_settings(command)
    part = jobs.part_of(command.shard_range, key="shard_range")
    job = ShardJob(Path(command.out), "pack.json")
    identity = _identity(command)
    if summary := job.finished(identity):
        _print(job.out, summary)
        print("finished already; nothing is left to do")
        return
    listing = list_source(command, work=job.work / "source")
    items, classes = numbered(listing)
    check_splits(items)
    _check_losses(command, listing.lost, len(items), left_out=listing.left_out)
    plan = make_plan(items, command, bytes_factor=_bytes_factor(items, settings))
    with contextlib.suppress(jobs.FinishedElsewhere):
        job.begin({**identity, "pictures": _digest(items), "shards": len(plan)})
        _write_missing(job, plan[part[0] :: part[1]], settings, command.workers)
    if num_missing := sum(not job.is_done(shard.name) for shard in plan):
        print(f"shards written: {len(plan) - num_missing} of {len(plan)}")
        return
    summary = job.finish(identity, lambda: _describe(job, command, plan, listing, classes))
    _print(job.out, summary)


def _check_losses(
    command: PackCommand, lost: Sequence[Named], num_items: int, *, left_out: Sequence[Named] = ()
) -> None:
    """Raises ConfigError when too many pictures cannot be read, or none can."""
    if not num_items:
        found = "; ".join(_texts([*lost, *left_out])[: jobs.NUM_NAMED])
        raise ConfigError(f"source={command.source}: no picture can be packed; {found}")
    jobs.check_lost(
        _texts(lost),
        of=f"source={command.source}",
        total=num_items + len(lost),
        max_skipped_fraction=command.max_skipped_fraction,
    )


def _texts(named: Sequence[Named]) -> list[str]:
    return [f"{shown_name(name)}: {reason}" for name, reason in named]


def _picture_settings(command: PackCommand) -> PictureSettings:
    size = tuple(command.size) if isinstance(command.size, list) else command.size
    sides = size if isinstance(size, tuple) else (size, size)
    least = 1 if isinstance(size, tuple) else 0
    if len(sides) != 2 or any(type(n) is not int or n < least for n in sides):
        raise ConfigError(f"size={command.size} is none of 0 (as they are), N and [H, W] in pixels")
    return PictureSettings(
        size or None, command.format, command.quality, command.background, command.max_pixels
    )


def _identity(command: PackCommand) -> dict[str, Any]:
    """What decides the bytes of the shards, beside the pictures."""
    source = shown(command.source) if isinstance(command.source, list) else str(command.source)
    keys = {k: v for k, v in vars(command).items() if k not in NOT_OF_SHARDS}
    identity = {"source": source, **keys}
    if not command.labels and not Path(source).exists():
        return identity  # CelebA's lists are gone with the source
    return {**identity, "labels": labels.digest(command.labels, command.source)}


# the plan


def make_plan(
    items: Sequence[Item], command: PackCommand, *, bytes_factor: float
) -> list[PlannedShard]:
    """Deal the items. bytes_factor: bytes of a picture in a shard over its bytes in the source.

    Raises ConfigError when nothing is left to train on.
    """
    splits: dict[str, list[Item]] = {}
    for item in items:
        splits.setdefault(item.split or "train", []).append(item)
    if "train" not in splits:
        raise ConfigError(
            f"source: all {len(items)} pictures are of {' and '.join(sorted(splits))}; add some to "
            "train on, or give the folder of that name itself as source="
        )
    if "validation" not in splits and command.validation:
        splits["train"], splits["validation"] = _held_out(
            splits["train"], command.validation, command.seed
        )
    shards: list[PlannedShard] = []
    for number, split in enumerate(SPLITS):
        members = splits.get(split, [])
        if command.shuffle:
            order = numpy_generator(command.seed, "pack", number).permutation(len(members))
            members = [members[i] for i in order.tolist()]
        shards += _cut(split, members, command.shard_mb * 1e6, bytes_factor)
    return shards


def _held_out(items: list[Item], validation: float, seed: int) -> tuple[list[Item], list[Item]]:
    """What is left, and what is set aside."""
    count = round(validation * len(items)) if validation < 1 else int(validation)
    if not 0 < count < len(items):
        raise ConfigError(
            f"validation={validation:g} sets {count} of {len(items)} pictures aside; give a part "
            "below 1 or a smaller number, or validation=0"
        )
    generator = numpy_generator(seed, "pack-validation")
    chosen = set(generator.choice(len(items), count, replace=False).tolist())
    return (
        [item for i, item in enumerate(items) if i not in chosen],
        [item for i, item in enumerate(items) if i in chosen],
    )


def _cut(
    split: str, items: list[Item], shard_bytes: float, bytes_factor: float
) -> list[PlannedShard]:
    """Shards of equal numbers of pictures, give or take one."""
    if not items:
        return []
    total = sum(item.num_bytes for item in items) * bytes_factor + 2048 * len(items)
    total += sum(file.num_bytes for item in items for _, file in item.companions)
    count = max(-(-int(total) // int(shard_bytes)), min(MIN_SHARDS, len(items) // MIN_PER_SHARD))
    count = min(max(1, count), len(items))
    borders = [len(items) * k // count for k in range(count + 1)]
    return [
        PlannedShard(split, k, low, items[low:high])
        for k, (low, high) in enumerate(pairwise(borders))
    ]


def _bytes_factor(items: list[Item], settings: PictureSettings) -> float:
    """Bytes in a shard over bytes in the source, measured on some pictures."""
    before = after = 0
    for item in items[:: max(1, len(items) // NUM_PROBED)]:
        try:
            picture = prepare(suffix_of(item.name), read(item.place), settings)
        except DamagedSampleError:
            continue
        before, after = before + item.num_bytes, after + len(picture.data)
    return after / before if before else 1.0


def _digest(items: Sequence[Item]) -> str:
    """Of the names, sizes, splits, classes and companions: another source has another one."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        companions = [(member, file.name, file.num_bytes) for member, file in item.companions]
        digest.update(repr((item.name, *item[2:-1], companions)).encode())
    return digest.hexdigest()


# the shards


def _write_missing(
    job: ShardJob,
    shards: Sequence[PlannedShard],
    settings: PictureSettings,
    workers: int,
) -> None:
    missing = {shard.name: shard for shard in shards if not job.is_done(shard.name)}
    total = sum(len(shard.items) for shard in shards)
    before = total - sum(len(shard.items) for shard in missing.values())
    with ProgressBar("packed", total, unit="pictures") as progress:
        jobs.run(
            lambda name, count: _write_shard(job, missing[name], settings, count),
            list(missing),
            workers=workers or len(os.sched_getaffinity(0)),
            progress=lambda done: progress(before + done),
        )


def _write_shard(
    job: ShardJob, shard: PlannedShard, settings: PictureSettings, count: Count
) -> None:
    counts: dict[str, Counter[str]] = {key: Counter() for key in COUNTED}
    with job.shard(shard.name) as (writer, report):
        report |= {"samples": 0, "kept": 0, "skipped": [], "names": []}
        for i, item in enumerate(shard.items):
            try:
                picture, members = _packed(item, settings)
            except DamagedSampleError as error:
                report["skipped"].append([item.name, str(error)])
            else:
                key = f"{shard.first + i:09d}"
                writer.write({"__key__": key, picture.suffix: picture.data, **members})
                report["names"].append(item.name)
                report["samples"] += 1
                report["kept"] += picture.kept
                counts["sizes"][f"{picture.shape[1]}x{picture.shape[2]}"] += 1
                counts["channels"][str(picture.shape[0])] += 1
                counts["labels"].update([str(item.category)] if "cls" in members else [])
                counts["members"].update(members.keys())
                counts["notes"].update([picture.note] if picture.note else [])
            count(1)
        counts["sizes"] = Counter(dict(counts["sizes"].most_common(MAX_SIZES)))
        report |= {key: dict(found) for key, found in counts.items()}


def _packed(item: Item, settings: PictureSettings) -> tuple[Picture, dict[str, bytes]]:
    """The picture of a sample and its other members. Raises DamagedSampleError."""
    data = read(item.place)
    members = {member: _companion(member, file) for member, file in item.companions}
    picture = prepare(suffix_of(item.name), data, settings, mask=members.get(MASK_MEMBER))
    if picture.mask is not None:
        members[MASK_MEMBER] = picture.mask
    if item.category is not None:
        members["cls"] = str(item.category).encode()
    if item.extra:
        members["json"] = _with_extra(members.get("json"), item.extra)
    return picture, members


def _companion(member: str, file: Item) -> bytes:
    if file.num_bytes > MAX_FILE_BYTES:
        raise DamagedSampleError(f"its .{member} is too large")
    try:
        return read(file.place)
    except DamagedSampleError as error:
        raise DamagedSampleError(f"its .{member}: {error}") from None


def _with_extra(text: bytes | None, extra: Mapping[str, Any]) -> bytes:
    """The .json of a sample with what a table says of it."""
    try:
        fields = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise DamagedSampleError("its .json has no fields; labels= could not add its own")
    return json.dumps({**fields, **extra}, sort_keys=True).encode()


# the end


def _describe(
    job: ShardJob,
    command: PackCommand,
    plan: Sequence[PlannedShard],
    listing: Listing,
    classes: tuple[str, ...],
) -> dict[str, Any]:
    """Index, names and contact sheet; the summary. Raises ConfigError when too many are lost."""
    reports = [job.report(shard.name) for shard in plan]
    skipped = [tuple(entry) for report in reports for entry in report["skipped"]]
    num_items = sum(report["samples"] for report in reports)
    _check_losses(command, [*skipped, *listing.lost], num_items)
    splits = {}
    for split in SPLITS:
        shards = [(s, r) for s, r in zip(plan, reports, strict=True) if s.split == split]
        if shards:
            splits[split] = _describe_split(job, split, shards)
    names = "".join(_name_lines(zip(plan, reports, strict=True)))
    write_durably(job.out / "names.txt", names.encode("utf-8", "surrogateescape"))
    save_png(_contact_sheet(job, [s for s in plan if s.split == "train"]), job.out / SHEET)
    return {
        "splits": splits,
        "classes": list(classes),
        "channels": dict(_sum(reports, "channels")),
        "sizes": dict(_sum(reports, "sizes").most_common(20)),
        "members": dict(_sum(reports, "members")),
        "skipped": [*skipped, *listing.lost, *listing.left_out],
        "notes": [*listing.notes, *(f"{text} ({n})" for text, n in _sum(reports, "notes").items())],
    }


def _describe_split(
    job: ShardJob, split: str, shards: Sequence[tuple[PlannedShard, Report]]
) -> dict[str, Any]:
    paths = [job.out / shard.name for shard, _ in shards]
    reports = [report for _, report in shards]
    write_info(paths, split=split)
    labels = _sum(reports, "labels")
    return {
        "samples": sum(report["samples"] for report in reports),
        "kept_byte_for_byte": sum(report["kept"] for report in reports),
        "shards": len(paths),
        "bytes": sum(path.stat().st_size for path in paths),
        "labels": dict(sorted(labels.items(), key=lambda kv: int(kv[0]))),
    }


def _sum(reports: Sequence[Report], key: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report[key])
    return total


def _name_lines(shards: Iterator[tuple[PlannedShard, Report]]) -> Iterator[str]:
    for shard, report in shards:
        for i, name in enumerate(report["names"]):
            yield f"{Path(shard.name).name}\t{i}\t{one_line(name)}\n"


def _contact_sheet(job: ShardJob, shards: Sequence[PlannedShard]) -> Image.Image:
    """Pictures from the beginning of each shard, cropped to squares."""
    each = -(-SHEET_PICTURES // len(shards))
    cells: list[np.ndarray] = []
    for shard in shards[:SHEET_PICTURES]:
        path = job.out / shard.name
        files = (
            (suffix_of(name), at, size)
            for name, at, size in files_of_tar(str(path))
            if suffix_of(name) in SUFFIXES and not name.endswith(f".{MASK_MEMBER}")
        )
        with open(path, "rb") as tar:
            for suffix, at, size in islice(files, each):
                tar.seek(at)
                cells.append(thumbnail(suffix, tar.read(size), SHEET_PIXELS))
    pictures = np.stack(cells[:SHEET_PICTURES]).transpose(0, 3, 1, 2)
    return grid(torch.from_numpy(np.ascontiguousarray(pictures)))


def _print(out: Path, summary: dict[str, Any]) -> None:
    for split, facts in summary["splits"].items():
        classes = f" classes={len(facts['labels'])}" if facts["labels"] else ""
        print(
            f"{out / split}: samples={facts['samples']} shards={facts['shards']} "
            f"bytes={facts['bytes']} kept_byte_for_byte={facts['kept_byte_for_byte']}{classes}"
        )
    sizes = [f"{size} ({count})" for size, count in list(summary["sizes"].items())[:3]]
    channels = [f"{key} ({count})" for key, count in summary["channels"].items()]
    print(f"sizes HxW: {', '.join(sizes)}; channels: {', '.join(channels)}")
    if count := summary["members"].get(MASK_MEMBER):
        print(f"missing pixels: {count} pictures have a .{MASK_MEMBER}; set data.mask=member")
    for note in summary["notes"]:
        print(f"note: {note}")
    jobs.print_left_out(_texts(summary["skipped"]), summary=out / "pack.json")
    print(f"look at {out / SHEET}")
