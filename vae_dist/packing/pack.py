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
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.data.decode import MASK_MEMBER, SUFFIXES
from vae_dist.data.indexing import write_info
from vae_dist.data.tar import DamagedSampleError, files_of_tar
from vae_dist.files import ProgressBar, printable, read_json, write_durably
from vae_dist.packing import jobs, labels
from vae_dist.packing.items import MAX_FILE_BYTES, Item, Listing, Named, Place, read, suffix_of
from vae_dist.packing.jobs import Count, Report, ShardJob
from vae_dist.packing.picture import prepare, thumbnail
from vae_dist.packing.sources import list_source, number_classes
from vae_dist.randomness import numpy_generator
from vae_dist.tracking.images import grid, save_png

NOT_OF_SHARDS = ("source", "labels", "out", "shard_range", "workers", "max_skipped_fraction")
MIN_SHARDS = 8  # of a large split
NUM_PROBED = 32  # pictures whose size in a shard is measured for the plan
COUNTED = ("sizes", "channels", "labels", "members", "notes")  # of the samples of a shard
SHEET, SHEET_PICTURES, SHEET_PIXELS = "contact-sheet.png", 64, 96

# by shard, as train/train-000000.tar: its pictures, with their numbers in the split
Plan = dict[str, list[tuple[int, Item]]]


def pack(command: PackCommand) -> None:
    """Write what is missing of the folder `command.out`; the last process describes it."""
    sides = command.size if isinstance(command.size, list) else [command.size or 1] * 2
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ConfigError(f"size={command.size} is none of 0 (as they are), N and [H, W] in pixels")
    part = re.fullmatch(r"(\d+)/(\d+)", command.shard_range)
    if not part or int(part[1]) >= int(part[2]):
        raise ConfigError(f"shard_range={command.shard_range} is not i/n with 0 <= i < n, like 0/8")
    job = ShardJob(Path(command.out), "pack.json", _identity(command))
    if summary := job.finished():
        _print(job.out, summary)
        print("finished already; nothing is left to do")
        return
    listing = list_source(command, work=job.work / "source")
    number_classes(listing)
    _check(command, listing)
    plan = make_plan(listing.items, command)
    try:
        job.begin(pictures=_digest(listing.items), shards=len(plan))
        _write_missing(job, plan, list(plan)[int(part[1]) :: int(part[2])], command)
        if num_missing := sum(not job.is_done(shard) for shard in plan):
            print(f"shards written: {len(plan) - num_missing} of {len(plan)}")
            return
        _print(job.out, job.finish(lambda: _describe(job, command, list(plan), listing)))
    except jobs.FinishedElsewhere:
        print("finished by another process; nothing is left to do")


def _identity(command: PackCommand) -> dict[str, Any]:
    """What decides the bytes of the shards, beside the pictures."""
    source = shown(command.source) if isinstance(command.source, list) else str(command.source)
    skipped = (*NOT_OF_SHARDS, *(() if command.image_key else ("image_key",)))
    identity = {"source": source, **{k: v for k, v in vars(command).items() if k not in skipped}}
    if not command.labels and not Path(source).exists():
        return identity  # CelebA's lists are gone with the source
    return {**identity, "labels": labels.digest(command)}


def _digest(items: Sequence[Item]) -> str:
    """Of the names, sizes, splits, classes and companions: another source has another one."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        companions = [(member, file.name, file.num_bytes) for member, file in item.companions]
        digest.update(repr((item.name, *item[2:-1], companions)).encode())
    return digest.hexdigest()


def _check(command: PackCommand, listing: Listing) -> None:
    """Raises ConfigError where nothing or too little can be packed, and when some pictures have a
    split and others have none: which one is meant by a folder `train` between folders of classes?
    """
    inside = [item for item in listing.items if item.split is not None]
    outside = [item for item in listing.items if item.split is None]
    if inside and outside:
        raise ConfigError(
            f"source: {len(inside)} pictures belong to a split ({printable(inside[0].name)}: "
            f"{inside[0].split}) and {len(outside)} to none ({printable(outside[0].name)}); put "
            "all of them below folders train, validation and test (a class of such a name below "
            "them too), or none, or say it in a column split of labels="
        )
    _check_lost(command, listing.lost, len(listing.items), left_out=listing.left_out)


def _check_lost(
    command: PackCommand, lost: Sequence[Named], num_packed: int, *, left_out: Sequence[Named] = ()
) -> None:
    if not num_packed:
        found = "; ".join(_texts([*lost, *left_out])[: jobs.NUM_NAMED])
        raise ConfigError(f"source={command.source}: no picture can be packed; {found}")
    jobs.check_lost(command, "source", _texts(lost), total=num_packed + len(lost))


def _texts(named: Sequence[Named]) -> list[str]:
    return [f"{printable(name)}: {reason}" for name, reason in named]


# the plan


def make_plan(items: Sequence[Item], command: PackCommand) -> Plan:
    """Deal the items. Raises ConfigError when nothing is left to train on."""
    splits: dict[str, list[Item]] = {"train": [], "validation": [], "test": []}
    for item in items:
        splits[item.split or "train"].append(item)
    if not splits["train"]:
        raise ConfigError(
            f"source: all {len(items)} pictures are of validation or test; add some to train on, "
            "or give the folder of that name itself as source="
        )
    if not splits["validation"] and command.validation:
        _hold_out(splits, command.validation, command.seed)
    bytes_factor = _bytes_factor(items, command)
    plan: Plan = {}
    for number, (split, members) in enumerate(splits.items()):
        if not members:
            continue
        if command.shuffle:
            order = numpy_generator(command.seed, "pack", number).permutation(len(members))
            members = [members[i] for i in order.tolist()]
        total = sum(item.num_bytes for item in members) * bytes_factor + 2048 * len(members)
        total += sum(file.num_bytes for item in members for _, file in item.companions)
        count = -(-int(total) // int(command.shard_mb * 1e6))
        pictures = list(enumerate(members))
        for k, (low, high) in enumerate(jobs.cut(len(members), count, at_least=MIN_SHARDS)):
            plan[f"{split}/{split}-{k:06d}.tar"] = pictures[low:high]
    return plan


def _hold_out(splits: dict[str, list[Item]], validation: float, seed: int) -> None:
    items = splits["train"]
    count = round(validation * len(items)) if validation < 1 else int(validation)
    if not 0 < count < len(items):
        raise ConfigError(
            f"validation={validation:g} sets {count} of {len(items)} pictures aside; give a part "
            "below 1 or a smaller number, or validation=0"
        )
    generator = numpy_generator(seed, "pack-validation")
    chosen = set(generator.choice(len(items), count, replace=False).tolist())
    splits["train"] = [item for i, item in enumerate(items) if i not in chosen]
    splits["validation"] = [item for i, item in enumerate(items) if i in chosen]


def _bytes_factor(items: Sequence[Item], command: PackCommand) -> float:
    """Bytes in a shard over bytes in the source, measured on some pictures."""
    before = after = 0
    for item in items[:: max(1, len(items) // NUM_PROBED)]:
        with contextlib.suppress(DamagedSampleError):
            after += len(prepare(suffix_of(item.name), read(item.place), command).data)
            before += item.num_bytes
    return after / before if before else 1.0


# the shards


def _write_missing(job: ShardJob, plan: Plan, mine: Sequence[str], command: PackCommand) -> None:
    missing = [shard for shard in mine if not job.is_done(shard)]
    total = sum(len(plan[shard]) for shard in missing)
    workers = command.workers or len(os.sched_getaffinity(0))
    with ProgressBar("packed", total, unit="pictures") as progress:

        def write(shard: str, count: Count) -> None:
            _write_shard(job, shard, plan[shard], command, count)

        jobs.run(write, missing, workers=workers, progress=progress)


def _write_shard(
    job: ShardJob,
    shard: str,
    items: Sequence[tuple[int, Item]],
    command: PackCommand,
    count: Count,
) -> None:
    counts: dict[str, Counter[str]] = {key: Counter() for key in COUNTED}
    names, skipped, num_kept = [], [], 0
    with job.shard(shard) as (writer, report):
        for number, item in items:
            try:
                data, members = read(item.place), _members(item)
                mask = members.get(MASK_MEMBER)
                picture = prepare(suffix_of(item.name), data, command, mask=mask)
            except DamagedSampleError as error:
                skipped.append([item.name, str(error)])
            else:
                if picture.mask is not None:
                    members[MASK_MEMBER] = picture.mask
                writer.write({"__key__": f"{number:09d}", picture.suffix: picture.data, **members})
                names.append(item.name)
                num_kept += picture.kept
                counts["sizes"][f"{picture.shape[1]}x{picture.shape[2]}"] += 1
                counts["channels"][str(picture.shape[0])] += 1
                counts["labels"].update([str(item.category)] if "cls" in members else [])
                counts["members"].update(members.keys())
                counts["notes"].update([picture.note] if picture.note else [])
            count(1)
        report |= {"names": names, "skipped": skipped, "kept": num_kept, **counts}


def _members(item: Item) -> dict[str, bytes]:
    """The members of a sample beside its picture. Raises DamagedSampleError."""
    members: dict[str, bytes] = {}
    for member, file in item.companions:
        try:
            members[member] = read(file.place)
        except DamagedSampleError as error:
            raise DamagedSampleError(f"its .{member}: {error}") from None
    if item.category is not None:
        members["cls"] = str(item.category).encode()
    if item.extra:
        try:
            fields = read_json(members.get("json", b"{}"), MAX_FILE_BYTES, name="its .json")
        except ValueError as error:
            raise DamagedSampleError(f"{error}; labels= could not add to it") from None
        members["json"] = json.dumps({**fields, **item.extra}, sort_keys=True).encode()
    return members


# the end


def _describe(job: ShardJob, command: PackCommand, plan: Sequence[str], listing: Listing) -> Report:
    """Index, names and contact sheet; the summary. Raises ConfigError when too many are lost."""
    reports = {shard: job.report(shard) for shard in plan}
    skipped = [(name, why) for report in reports.values() for name, why in report["skipped"]]
    lost = [*skipped, *listing.lost]
    _check_lost(command, lost, sum(len(report["names"]) for report in reports.values()))
    splits: dict[str, Report] = {}
    for split in dict.fromkeys(shard.partition("/")[0] for shard in plan):
        mine = {shard: r for shard, r in reports.items() if shard.startswith(f"{split}/")}
        write_info([job.out / shard for shard in mine], split=split)
        labels_found = _sum(mine.values(), "labels")
        splits[split] = {
            "samples": sum(len(report["names"]) for report in mine.values()),
            "kept_byte_for_byte": sum(report["kept"] for report in mine.values()),
            "shards": len(mine),
            "bytes": sum((job.out / shard).stat().st_size for shard in mine),
            "labels": dict(sorted(labels_found.items(), key=lambda kv: int(kv[0]))),
        }
    lines = [
        f"{Path(shard).name}\t{i}\t{printable(name)}\n"
        for shard, report in reports.items()
        for i, name in enumerate(report["names"])
    ]
    write_durably(job.out / "names.txt", "".join(lines).encode())
    _save_contact_sheet([job.out / shard for shard in plan if shard.startswith("train/")])
    notes = [f"{text} ({num})" for text, num in _sum(reports.values(), "notes").items()]
    return {
        "splits": splits,
        "classes": list(listing.classes),
        "channels": dict(_sum(reports.values(), "channels")),
        "sizes": dict(_sum(reports.values(), "sizes").most_common(20)),
        "members": dict(_sum(reports.values(), "members")),
        "skipped": [*lost, *listing.left_out],
        "notes": [*listing.notes, *notes],
    }


def _sum(reports: Iterable[Report], key: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report[key])
    return total


def _save_contact_sheet(shards: Sequence[Path]) -> None:
    """Pictures from the beginning of each shard, cropped to squares."""
    each = -(-SHEET_PICTURES // max(1, len(shards)))
    cells: list[np.ndarray] = []
    for shard in shards[:SHEET_PICTURES]:
        files = (
            (suffix_of(name), Place(str(shard), at, size))
            for name, at, size in files_of_tar(str(shard))
            if suffix_of(name) in SUFFIXES and not name.endswith(f".{MASK_MEMBER}")
        )
        cells += [thumbnail(s, read(place), SHEET_PIXELS) for s, place in islice(files, each)]
    if not cells:
        print(f"no {SHEET}: no training picture could be read")
        return
    pictures = np.stack(cells[:SHEET_PICTURES]).transpose(0, 3, 1, 2)
    image = grid(torch.from_numpy(np.ascontiguousarray(pictures)))
    save_png(image, shards[0].parent.parent / SHEET)


def _print(out: Path, summary: Report) -> None:
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
