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
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps

from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.data.decode import MASK_MEMBER, SUFFIXES, decode_own
from vae_dist.data.index import write_info
from vae_dist.data.tar import DamagedSampleError, files_of_tar, key_and_suffix
from vae_dist.files import printable, progress_bar, read_json, write_durably
from vae_dist.packing import jobs, labels
from vae_dist.packing.items import BY_CONTENT, Item, Listing, Place, read, suffix_of
from vae_dist.packing.jobs import Report, ShardJob
from vae_dist.packing.picture import prepare
from vae_dist.packing.sources import list_source, number_classes
from vae_dist.randomness import numpy_generator
from vae_dist.tracking.images import grid, save_png, single

NOT_OF_SHARDS = ("labels", "out", "shard_range", "workers", "max_skipped_fraction")
MIN_SHARDS = 8  # of a large split
NUM_FACTS = 20  # of the samples, the most common ones
NUM_PROBED = 32  # pictures whose size in a shard is measured for the plan
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
    identity = {key: value for key, value in vars(command).items() if key not in NOT_OF_SHARDS}
    table = labels.text_of(Path(command.labels)).encode() if command.labels else b""
    identity["labels"] = hashlib.blake2b(table, digest_size=16).hexdigest()
    job = ShardJob(Path(command.out), "pack.json", identity)
    if job.is_finished():
        print(
            f"{job.out}: finished already; pictures that are new in the source want another folder"
        )
        return
    listing = list_source(command, work=job.work / "source")
    number_classes(listing)
    _check(command, listing)
    plan = make_plan(listing.items, command)
    job.begin(pictures=_digest(listing.items), shards=len(plan))
    mine = list(plan)[int(part[1]) :: int(part[2])]
    missing = [shard for shard in mine if not job.is_done(shard)]
    workers = command.workers or len(os.sched_getaffinity(0))
    with progress_bar("packed", len(missing), unit="shards") as progress:
        write = partial(_write_shard, job, plan, command)
        jobs.run(write, missing, workers=workers, progress=progress)
    if num_missing := sum(not job.is_done(shard) for shard in plan):
        print(f"shards written: {len(plan) - num_missing} of {len(plan)}")
        return
    with job.writing():
        summary = _describe(job, command, plan, listing)
        job.finish(summary)
    _print(job.out, summary)


def _digest(items: Sequence[Item]) -> str:
    """Of the names, sizes, splits, classes and companions: another source has another one."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        companions = [(member, file.name, file.place.size) for member, file in item.companions]
        digest.update(repr((item.name, item.place.size, *item[2:-1], companions)).encode())
    return digest.hexdigest()


def _check(command: PackCommand, listing: Listing) -> None:
    """Raises ConfigError where nothing or too little can be packed, and when some pictures have a
    split and others have none: which one is meant by a folder `train` between folders of classes?
    """
    if not listing.items:
        found = "; ".join([*listing.lost, *listing.left_out][: jobs.NUM_NAMED]) or "it is empty"
        raise ConfigError(f"source={shown(command.source)}: no picture can be packed; {found}")
    inside = [item for item in listing.items if item.split is not None]
    outside = [item for item in listing.items if item.split is None]
    if inside and outside:
        raise ConfigError(
            f"source: {len(inside)} pictures belong to a split ({printable(inside[0].name)}: "
            f"{inside[0].split}) and {len(outside)} to none ({printable(outside[0].name)}); put "
            "all of them below folders train, validation and test, or none"
        )
    total = len(listing.items) + len(listing.lost)
    jobs.check_lost(command, "source", listing.lost, total=total)


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
        total = sum(item.place.size for item in members) * bytes_factor + 2048 * len(members)
        total += sum(file.place.size for item in members for _, file in item.companions)
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
            after += len(prepare(read(item.place), command).data)
            before += item.place.size
    return after / before if before else 1.0


# the shards


def _write_shard(job: ShardJob, plan: Plan, command: PackCommand, shard: str) -> None:
    facts: Counter[str] = Counter()  # of the samples
    names, lost = [], []
    with job.shard(shard) as (writer, report):
        for number, item in plan[shard]:
            name = printable(item.name)
            try:
                data, members = read(item.place), _members(item)
                picture = prepare(data, command, mask=members.get(MASK_MEMBER))
            except DamagedSampleError as error:
                lost.append(f"{name}: {error}")
                continue
            channels, height, width = picture.shape
            facts.update([*picture.notes, f"{channels} channels", f"{height} x {width} pixels"])
            if (suffix := suffix_of(name)) in BY_CONTENT:
                facts[f".{suffix}, decoded by content"] += 1
            if picture.mask is not None:
                members[MASK_MEMBER] = picture.mask
                facts["with missing pixels (set data.mask=member)"] += 1
            writer.write({"__key__": f"{number:09d}", picture.suffix: picture.data, **members})
            names.append(name)
        report |= {"names": names, "lost": lost, "facts": facts}


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
            fields = read_json(members.get("json", b"{}"), jobs.MAX_JSON_BYTES, name="its .json")
        except ValueError as error:
            raise DamagedSampleError(f"{error}; labels= could not add to it") from None
        members["json"] = json.dumps({**fields, **item.extra}, sort_keys=True).encode()
    return members


# the end


def _describe(job: ShardJob, command: PackCommand, plan: Plan, listing: Listing) -> Report:
    """Write index, names, contact sheet; the summary. Raises ConfigError when too many are lost."""
    reports = {shard: job.report(shard) for shard in plan}
    lost = [text for report in reports.values() for text in report["lost"]] + listing.lost
    num_packed = sum(len(report["names"]) for report in reports.values())
    jobs.check_lost(command, "source", lost, total=len(lost) + num_packed)
    splits: dict[str, Report] = {}
    for split, names in groupby(plan, key=lambda shard: shard.partition("/")[0]):
        shards = list(names)
        write_info([job.out / shard for shard in shards], split=split)
        splits[split] = {
            "samples": sum(len(reports[shard]["names"]) for shard in shards),
            "shards": len(shards),
            "bytes": sum((job.out / shard).stat().st_size for shard in shards),
        }
    lines = [
        f"{Path(shard).name}\t{i}\t{name}\n"
        for shard, report in reports.items()
        for i, name in enumerate(report["names"])
    ]
    write_durably(job.out / "names.txt", "".join(lines).encode())
    shown_shards = [job.out / shard for shard in plan if shard.startswith("train/")]
    _save_contact_sheet(job.out / SHEET, shown_shards)
    facts = sum((Counter(report["facts"]) for report in reports.values()), Counter[str]())
    return {
        "splits": splits,
        "num_classes": len({item.category for item in listing.items} - {None}),
        "classes": list(listing.classes),
        "facts": dict(facts.most_common(NUM_FACTS)),
        "skipped": [*lost, *listing.left_out],
    }


def _save_contact_sheet(path: Path, shards: Sequence[Path]) -> None:
    """Pictures from the beginning of each shard, cropped to squares."""
    cells: list[torch.Tensor] = []
    for shard in map(str, shards[:SHEET_PICTURES]):
        files = (file for file in files_of_tar(shard) if key_and_suffix(file[0])[1] in SUFFIXES)
        for name, at, size in islice(files, -(-SHEET_PICTURES // len(shards))):
            with contextlib.suppress(DamagedSampleError):
                data = read(Place(shard, at, size))
                levels = np.nan_to_num(decode_own(suffix_of(name), data, max_pixels=sys.maxsize))
                image = single(torch.from_numpy(np.ascontiguousarray(levels))).convert("RGB")
                image = ImageOps.fit(image, (SHEET_PIXELS, SHEET_PIXELS))
                cells.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    if cells:
        save_png(grid(cells[:SHEET_PICTURES]), path)


def _print(out: Path, summary: Report) -> None:
    for split, facts in summary["splits"].items():
        words = " ".join(f"{key}={value}" for key, value in facts.items())
        print(f"{out / split}: {words} num_classes={summary['num_classes']}")
    for fact, count in summary["facts"].items():
        print(f"{fact}: {count}")
    print(f"{out / 'names.txt'} says which sample is which picture, {out / SHEET} shows the first")
    jobs.print_left_out(summary["skipped"], summary=out / "pack.json")
