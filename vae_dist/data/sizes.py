"""The sizes of native images, before training: looked up in the headers of a part of them.

In: the indexes of the data sets and how their images are read. Out: nothing, or a ConfigError that
names two images that differ although they must not, or images that are too small. What is not
among those that are looked at, the reader finds.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.data.buckets import Size
from vae_dist.data.index import NUM_THREADS, ShardIndex
from vae_dist.data.reader import SampleReader, in_words, ways_to_one_size
from vae_dist.data.remote import is_pipe, is_remote
from vae_dist.data.transforms import ImageSettings

NUM_LOOKED_AT = 256  # finds a size that one image in a hundred has in 92 of 100 data sets
NUM_REMOTE = 32  # where each takes two requests
MAX_BYTES = 2**26  # of these images together
NUM_NAMED = 2


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
        size = reader.size_or_none(reader.read(shard, number, number + 1)[0], shard)
        return None if size is None else Measured(reader.name(shard, number), size)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        places = zip(shards.tolist(), within.tolist(), strict=True)
        return [found for found in pool.map(measure, places) if found is not None]
