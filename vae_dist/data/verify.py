"""Reads every sample of a data set once: can it be decoded, is its key its own, how large is it,
and does it say that pixels are missing.

In: an index. Out: the `Findings` in each shard, in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from vae_dist.data.decode import MASK_MEMBER, decode_mask, decode_own, image_of
from vae_dist.data.features import MEMBER, Features
from vae_dist.data.index import Run, ShardIndex
from vae_dist.data.reader import SampleReader, single_sample
from vae_dist.data.tar import DamagedSampleError, ShardError
from vae_dist.data.transforms import ImageSettings

NUM_THREADS = 4  # decoders release the interpreter
READ_TOGETHER = 32  # samples


@dataclass
class Findings:
    """What is in a shard: sizes (H, W) and numbers of channels of the readable samples."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    masks: Counter[str] = field(default_factory=Counter)  # samples by the data.mask they ask for
    problems: list[str] = field(default_factory=list)  # of damaged samples, and of the shard
    keys: list[str] = field(default_factory=list)
    double: list[str] = field(default_factory=list)  # keys that an earlier sample has too


def verify(index: ShardIndex, settings: ImageSettings) -> Iterator[Findings]:
    """What is found in each shard, in order."""
    reader = SampleReader(index, settings, seed=0)
    seen: set[int] = set()  # hashes of keys
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for found in pool.map(lambda s: _findings(reader, s), range(len(index.paths))):
            found.double = [key for key in found.keys if hash(key) in seen]
            seen.update(map(hash, found.keys))
            yield found


def _findings(reader: SampleReader, shard: int) -> Findings:
    found, settings = Findings(), reader.settings
    path, length = reader.index.paths[shard], int(reader.index.lengths[shard])
    try:
        for start in range(0, length, READ_TOGETHER):
            run = Run(shard, start, min(length, start + READ_TOGETHER))
            for number, data in enumerate(reader.read([run]), start):
                try:
                    sample = single_sample(data, path)
                    found.keys.append(str(sample["__key__"]))
                    suffix, image = image_of(sample, settings.image_key)
                    pixels = decode_own(suffix, image, max_pixels=settings.max_pixels)
                    size = pixels.shape[1], pixels.shape[2]
                    decode_mask(sample, size, max_pixels=settings.max_pixels)
                    if MEMBER in sample:
                        Features.from_bytes(sample[MEMBER])
                except DamagedSampleError as error:
                    found.problems.append(f"{path} sample {number}: {error}")
                    continue
                found.masks["nan"] += bool(np.isnan(pixels).any())
                found.masks["member"] += MASK_MEMBER in sample
                found.channels[len(pixels)] += 1
                found.sizes[size] += 1
    except ShardError as error:
        found.problems.append(str(error))
    return found
