"""Pictures of a source become shards: planned, written by several processes, checked, described.

In: the keys of `pack`. Out: what `vae_dist.pack` says; raises ConfigError with a way out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import MASK_MEMBER, SUFFIXES
from vae_dist.data.index import load_index, write_info
from vae_dist.data.reader import SampleReader, single_sample
from vae_dist.data.shards import WORK
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import ImageSettings
from vae_dist.files import ProgressBar, sync_folder, write_durably
from vae_dist.packing.items import Item, Source, check_splits, numbered
from vae_dist.packing.open import label_digest, open_source
from vae_dist.packing.picture import PictureSettings, prepare, thumbnail
from vae_dist.packing.plan import Plan, make_plan
from vae_dist.packing.shards import Writing, is_written, report_path, write_missing
from vae_dist.tracking.images import grid, save_png

NUM_PROBED = 32  # pictures whose size in a shard is measured for the plan
NUM_NAMED = 5  # damaged pictures that the screen shows
SHEET_PICTURES, SHEET_PIXELS = 64, 96
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without them


def pack(command: PackCommand) -> None:
    out = Path(command.out)
    settings = _picture_settings(command)
    if (out / "pack.json").exists():
        _check_finished(command, out)
        return
    work = out / WORK
    if out.is_dir() and any(path.name != WORK for path in out.iterdir()) and not work.exists():
        raise ConfigError(f"out={out}: the folder is in use; give another one, or empty it")
    part = _shard_range(command.shard_range)
    source = open_source(command.source, labels=command.labels, work_folder=work / "source")
    listing = source.list()
    items, classes = numbered(listing)
    if not items:
        refused = "".join(f"; {name}: {reason}" for name, reason in listing.refused[:NUM_NAMED])
        raise ConfigError(f"source={command.source}: no picture is there{refused}")
    check_splits(items)
    plan = make_plan(
        items,
        validation=command.validation,
        shard_bytes=command.shard_mb * 1e6,
        bytes_factor=_bytes_factor(source, items, settings),
        shuffle=command.shuffle,
        seed=command.seed,
        settings=_identity(command),
    )
    _claim(work, plan)
    numbers = [n for n in range(len(plan.shards)) if n % part[1] == part[0]]
    writing = Writing(source, plan, work, settings)
    workers = command.workers or len(os.sched_getaffinity(0))
    total = sum(len(plan.shards[n].items) for n in numbers)
    with ProgressBar("packed", total, unit="pictures") as progress:
        write_missing(writing, numbers, workers=workers, progress=progress)
    missing = [shard for shard in plan.shards if not is_written(work, shard)]
    if missing:
        print(f"shards written: {len(plan.shards) - len(missing)} of {len(plan.shards)}")
        return
    _finish(command, plan, listing.refused, classes)


def _picture_settings(command: PackCommand) -> PictureSettings:
    size = command.size
    if isinstance(size, list):
        size = tuple(size)
    valid = size == 0 or (isinstance(size, int) and size > 0)
    valid = valid or (
        isinstance(size, tuple)
        and len(size) == 2
        and all(isinstance(n, int) and n > 0 for n in size)
    )
    if not valid or isinstance(size, bool):
        raise ConfigError(f"size={command.size} is none of 0 (as they are), N and [H, W] in pixels")
    return PictureSettings(
        size or None, command.format, command.quality, command.background, command.max_pixels
    )


def _shard_range(text: str) -> tuple[int, int]:
    """(i, n) of "i/n": this command writes the shards k with k mod n = i."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(f"shard_range={text} is not i/n with 0 <= i < n, like 0/8")
    return int(found[1]), int(found[2])


def _identity(command: PackCommand) -> dict[str, Any]:
    """What decides the bytes of the shards."""
    keys = ("size", "format", "quality", "background", "max_pixels", "shard_mb", "validation")
    identity = {key: getattr(command, key) for key in (*keys, "shuffle", "seed")}
    labels = label_digest(command.source, command.labels)
    return {**identity, "labels": labels} if labels else identity


def _bytes_factor(source: Source, items: list[Item], settings: PictureSettings) -> float:
    """Bytes in a shard over bytes in the source, measured on some pictures."""
    before = after = 0
    for item in items[:: max(1, len(items) // NUM_PROBED)]:
        try:
            picture = prepare(*source.read(item), settings)
        except DamagedSampleError:
            continue
        before, after = before + item.num_bytes, after + len(picture.data)
    return after / before if before else 1.0


def _claim(work: Path, plan: Plan) -> None:
    """Begin this plan in the work folder, or find it begun. Raises ConfigError for another's."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "plan.json"
    mine = {"identity": plan.identity, "shards": len(plan.shards)}
    try:
        begun = json.loads(path.read_text())
    except FileNotFoundError:
        write_durably(path, json.dumps(mine).encode())
        return
    if begun != mine:
        raise ConfigError(
            f"out={work.parent}: another pack was begun there, with another source or other keys "
            f"or labels; run that command again, or remove {work}, or give another folder"
        )


def _check_finished(command: PackCommand, out: Path) -> None:
    summary = json.loads((out / "pack.json").read_text())
    asked = {"source": _shown(command.source), **_identity(command)}
    if "labels" not in asked and not Path(asked["source"]).exists():
        summary["command"].pop("labels", None)  # CelebA's lists, gone with the source
    if summary["command"] != json.loads(json.dumps(asked)):
        raise ConfigError(
            f"out={out}: holds shards that were made from source={summary['command']['source']} "
            "or with other keys or labels; give another folder, or remove this one"
        )
    _say(out, summary)
    print("finished already; nothing is left to do")


def _shown(source: Any) -> str:
    return source if isinstance(source, str) else ",".join(map(str, source))


# the end


def _finish(
    command: PackCommand, plan: Plan, refused: list[tuple[str, str]], classes: tuple[str, ...]
) -> None:
    """Move the shards into place, or find that another job of the array did so."""
    out = Path(command.out)
    work = out / WORK
    with _alone(work):
        if (out / "pack.json").exists():
            _check_finished(command, out)
        else:
            _move_and_describe(command, plan, refused, classes)
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """One job of an array at a time; the system lifts the lock of one that is killed."""
    with _lock_file(work) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def _lock_file(work: Path) -> BinaryIO:
    while True:
        work.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the job that ended first removes the folder
            return open(work / "lock", "wb")


def _move_and_describe(
    command: PackCommand, plan: Plan, refused: list[tuple[str, str]], classes: tuple[str, ...]
) -> None:
    """The shards in their places, index, names, contact sheet and, last, the summary."""
    out = Path(command.out)
    work = out / WORK
    reports = [json.loads(report_path(work, shard).read_text()) for shard in plan.shards]
    skipped = [tuple(entry) for report in reports for entry in report["skipped"]]
    fraction = len(skipped) / plan.num_items()
    if fraction > command.max_skipped_fraction:
        raise ConfigError(
            [
                f"source={_shown(command.source)}: {len(skipped)} of {plan.num_items()} pictures "
                "cannot be packed:",
                *(f"  {name}: {reason}" for name, reason in skipped[:NUM_NAMED]),
                "repair them, or leave them out with max_skipped_fraction=1",
            ]
        )
    splits = {}
    for split in plan.splits:
        shards = plan.of(split)
        own = [r for r, shard in zip(reports, plan.shards, strict=True) if shard.split == split]
        if not (out / split).exists():  # a job that was killed may have moved it
            write_info([work / split / shard.name for shard in shards], split=split)
            os.rename(work / split, out / split)
        splits[split] = {
            "samples": sum(report["samples"] for report in own),
            "kept_byte_for_byte": sum(report["kept"] for report in own),
            "shards": len(shards),
            "bytes": sum((out / split / shard.name).stat().st_size for shard in shards),
            "labels": dict(sorted(_sum(own, "labels").items(), key=lambda kv: int(kv[0]))),
        }
    sync_folder(out)
    write_durably(out / "names.txt", "".join(_name_lines(plan, reports)).encode())
    save_png(_contact_sheet(out / plan.splits[0]), out / "contact-sheet.png")
    summary = {
        "command": {"source": _shown(command.source), **_identity(command)},
        "splits": splits,
        "classes": list(classes),
        "channels": dict(_sum(reports, "channels")),
        "sizes": dict(_sum(reports, "sizes").most_common(20)),
        "members": dict(_sum(reports, "members")),
        "skipped": [*skipped, *refused],
    }
    write_durably(out / "pack.json", json.dumps(summary, indent=1).encode())
    _say(out, summary)


def _sum(reports: list[dict[str, Any]], key: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report[key])
    return total


def _name_lines(plan: Plan, reports: list[dict[str, Any]]) -> Iterator[str]:
    for shard, report in zip(plan.shards, reports, strict=True):
        for i, name in enumerate(report["names"]):
            yield f"{shard.name}\t{i}\t{name}\n"


def _contact_sheet(folder: Path) -> Any:
    """Pictures from the beginning of each shard, cropped to squares."""
    index = load_index(str(folder), key="out", create=False)
    reader = SampleReader(index, ImageSettings(3, (1, 1), True, 1), seed=0)
    each = -(-SHEET_PICTURES // len(index.paths))
    pictures: list[np.ndarray] = []
    for shard, length in enumerate(index.lengths.tolist()):
        for data in reader.read(shard, 0, min(each, length)) if length else []:
            sample = single_sample(data, index.paths[shard])
            name = next(name for name in sample if name in SUFFIXES)
            pictures.append(thumbnail(name, sample[name], SHEET_PIXELS))
    cells = np.stack(pictures[:SHEET_PICTURES]).transpose(0, 3, 1, 2)
    return grid(torch.from_numpy(np.ascontiguousarray(cells)))


def _say(out: Path, summary: dict[str, Any]) -> None:
    for split, facts in summary["splits"].items():
        classes = f" classes={len(facts['labels'])}" if facts["labels"] else ""
        print(
            f"{out / split}: samples={facts['samples']} shards={facts['shards']} "
            f"bytes={facts['bytes']} kept_byte_for_byte={facts['kept_byte_for_byte']}{classes}"
        )
    sizes = [f"{size} ({count})" for size, count in list(summary["sizes"].items())[:3]]
    channels = [f"{key} ({count})" for key, count in summary["channels"].items()]
    print(f"sizes HxW: {', '.join(sizes)}; channels: {', '.join(channels)}")
    if summary.get("members", {}).get(MASK_MEMBER):
        count = summary["members"][MASK_MEMBER]
        print(f"missing pixels: {count} pictures have a .{MASK_MEMBER}; set data.mask=member")
    for name, reason in summary["skipped"][:NUM_NAMED]:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if len(summary["skipped"]) > NUM_NAMED:
        more = len(summary["skipped"]) - NUM_NAMED
        print(f"left out: {more} more, listed in {out / 'pack.json'}", file=sys.stderr)
    print(f"look at {out / 'contact-sheet.png'}")
