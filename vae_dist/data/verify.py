"""Reads every sample of a data set once: can it be decoded, is its key its own, how large is it,
and does it say that pixels are missing.

In: an index. Out: a `ShardReport` for each shard, in order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vae_dist.data.decode import MASK_MEMBER, decode_mask, decode_own, image_of
from vae_dist.data.index import ShardIndex
from vae_dist.data.reader import SampleReader, single_sample
from vae_dist.data.tar import DamagedSampleError, ShardError
from vae_dist.data.transforms import ImageSettings

NUM_THREADS = 4  # decoders release the interpreter
READ_TOGETHER = 32  # samples


@dataclass
class ShardReport:
    """What is in a shard: sizes (H, W) and numbers of channels of the readable samples."""

    path: str
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    masks: Counter[str] = field(default_factory=Counter)  # samples by the data.mask they ask for
    damaged: list[tuple[int, str]] = field(default_factory=list)  # (index, reason)
    double: list[str] = field(default_factory=list)  # keys that an earlier sample has too
    error: str = ""  # why the shard as a whole cannot be read on


def verify(index: ShardIndex, settings: ImageSettings) -> Iterator[ShardReport]:
    """A report for each shard, in order."""
    reader = SampleReader(index, settings, seed=0)
    seen: set[bytes] = set()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for report, keys in pool.map(lambda s: _report(reader, s), range(len(index.paths))):
            for key in keys:
                name = hashlib.blake2b(
                    key.encode(errors="surrogateescape"), digest_size=12
                ).digest()
                if name in seen:
                    report.double.append(key)
                seen.add(name)
            yield report


def _report(reader: SampleReader, shard: int) -> tuple[ShardReport, list[str]]:
    """The report, but for double keys, and all keys."""
    report, keys = ShardReport(reader.index.paths[shard]), list[str]()
    length = int(reader.index.lengths[shard])
    try:
        for start in range(0, length, READ_TOGETHER):
            samples = reader.read(shard, start, min(length, start + READ_TOGETHER))
            for number, data in enumerate(samples, start):
                try:
                    sample = single_sample(data, report.path)
                    keys.append(str(sample["__key__"]))
                    _count(report, sample, max_pixels=reader.settings.max_pixels)
                except DamagedSampleError as error:
                    report.damaged.append((number, str(error)))
    except ShardError as error:
        report.error = str(error)
    return report, keys


def _count(report: ShardReport, sample: Mapping[str, Any], *, max_pixels: int) -> None:
    suffix, image = image_of(sample)
    pixels = decode_own(suffix, image, max_pixels=max_pixels)
    report.masks["nan"] += bool(np.isnan(pixels).any())
    decode_mask(sample, pixels.shape[1:], max_pixels=max_pixels)
    report.masks["member"] += MASK_MEMBER in sample
    report.channels[len(pixels)] += 1
    report.sizes[pixels.shape[1], pixels.shape[2]] += 1
