"""Reads every sample of a data set once: can it be decoded, is its key its own, how large is it,
and does it say that pixels are missing.

In: an index. Out: a `ShardReport` for each shard, in order, and what they sum up to.

"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

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
    keys: list[tuple[bytes, str]] = field(default_factory=list)  # (digest, key)


def verify(index: ShardIndex, *, max_pixels: int) -> Iterator[ShardReport]:
    """A report for each shard, in order."""
    seen: set[bytes] = set()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        shards = range(len(index.paths))
        for report in pool.map(lambda s: _verify_shard(index, s, max_pixels), shards):
            for digest, key in report.keys:
                if digest in seen:
                    report.double.append(key)
                seen.add(digest)
            report.keys = []
            yield report


def _verify_shard(index: ShardIndex, shard: int, max_pixels: int) -> ShardReport:
    report = ShardReport(index.paths[shard])
    reader = SampleReader(index, ImageSettings(3, (1, 1), True, max_pixels), seed=0)
    length = int(index.lengths[shard])
    try:
        for start in range(0, length, READ_TOGETHER):
            samples = reader.read(shard, start, min(length, start + READ_TOGETHER))
            for number, data in enumerate(samples, start):
                _verify_sample(report, number, data, max_pixels)
    except ShardError as error:
        report.error = str(error)
    return report


def _verify_sample(
    report: ShardReport, number: int, data: bytes | memoryview, max_pixels: int
) -> None:
    digest, key = b"%d" % number + report.path.encode(), f"sample {number}"
    try:
        sample = single_sample(data, report.path)
        key = str(sample["__key__"])
        digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=12).digest()
        suffix, image = image_of(sample)
        pixels = decode_own(suffix, image, max_pixels=max_pixels)
        shape = pixels.shape
        report.masks["nan"] += bool(np.isnan(pixels).any())
        decode_mask(sample, shape[1:], max_pixels=max_pixels)
        report.masks["member"] += MASK_MEMBER in sample
        report.channels[shape[0]] += 1
        report.sizes[shape[1], shape[2]] += 1
    except DamagedSampleError as error:
        report.damaged.append((number, str(error)))
    report.keys.append((digest, key))
