"""Reads every sample of a data set once: can it be decoded, is its key its own, how large is it,
and does it say that pixels are missing.

In: an index. Out: a `ShardReport` for each shard, in order, and what they sum up to.

`check_native_sizes` looks at the sizes of native images before training, in the headers of a part
of them: two images that differ although they must not, or images that are too small, are named.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.data.buckets import Size
from vae_dist.data.decode import MASK_MEMBER, decode_mask, decode_own, image_of
from vae_dist.data.index import NUM_THREADS as NUM_READERS
from vae_dist.data.index import ShardIndex
from vae_dist.data.reader import SampleReader, in_words, single_sample, ways_to_one_size
from vae_dist.data.sources import is_pipe, is_remote
from vae_dist.data.tar import DamagedSampleError, ShardError
from vae_dist.data.transforms import ImageSettings

NUM_THREADS = 4  # decoders release the interpreter
READ_TOGETHER = 32  # samples
NUM_LOOKED_AT = 256  # finds a size that one image in a hundred has in 92 of 100 data sets
NUM_REMOTE = 32  # where each takes two requests
MAX_BYTES = 2**26  # of these images together
NUM_NAMED = 2


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


class NativeSet(NamedTuple):
    """A data set, as the config key `key` names it."""

    key: str
    shards: ShardIndex
    settings: ImageSettings


class Measured(NamedTuple):
    name: str
    size: Size


def check_native_sizes(sets: list[NativeSet], *, max_skipped_fraction: float) -> None:
    """Raises ConfigError where images must share the size of the first set's first one and do not,
    or where more than that part of them is too small."""
    first = Measured("the first one", sets[0].settings.size)
    for key, shards, settings in sets:
        if settings.resize or not (settings.needs or not settings.any_size):
            continue
        measured = sampled_sizes(shards, settings)
        if not settings.any_size:
            same = [image for image in measured if image.size == settings.size]
            if key == sets[0].key and same:
                first = same[0]
            for name, size in measured:
                if size != settings.size:
                    raise ConfigError(
                        f"data.resolution=native, {key}: {name} is {in_words(size)} pixels, but "
                        f"{first.name} is {in_words(first.size)}; {ways_to_one_size(first.size)}"
                    )
        small = [
            f"{name}: {problem}" for name, size in measured if (problem := settings.too_small(size))
        ]
        if len(small) > max_skipped_fraction * len(measured):
            raise ConfigError(
                f"data.resolution=native, {key}: {len(small)} of {len(measured)} images that were "
                f"looked at are too small ({'; '.join(small[:NUM_NAMED])}), more than "
                f"data.max_skipped_fraction={max_skipped_fraction:g}; leave them out of the data "
                "set, bring all to one size with data.resolution=N, or change that key"
            )


def sampled_sizes(index: ShardIndex, settings: ImageSettings) -> list[Measured]:
    """Of images that lie evenly over the data set, the first and the last among them.

    Left out is what cannot be decoded, or is read front to back (`pipe:`). Raises ShardError.
    """
    count = NUM_REMOTE if any(map(is_remote, index.paths)) else NUM_LOOKED_AT
    count = max(2, min(count, int(MAX_BYTES / max(1.0, index.mean_sample_bytes))))
    numbers = np.unique(np.linspace(0, index.num_samples - 1, count).astype(np.int64))
    ends = np.cumsum(index.lengths)
    shards = np.searchsorted(ends, numbers, "right")
    within = numbers - (ends - index.lengths)[shards]
    reader = SampleReader(index, settings, seed=0)

    def measure(place: tuple[int, int]) -> Measured | None:
        shard, number = place
        if is_pipe(index.paths[shard]):
            return None
        size = reader.size_or_none(reader.read(shard, number, number + 1)[0], shard, number)
        return None if size is None else Measured(reader.name(shard, number), size)

    with ThreadPoolExecutor(NUM_READERS) as pool:
        places = zip(shards.tolist(), within.tolist(), strict=True)
        return [found for found in pool.map(measure, places) if found is not None]
