"""Which images go into which shard of latents: decided before the first one is encoded.

In: the images, the model, the keys of `encode`. Out: shards as ranges of sample numbers in index
order. The cut and all that decides the bytes of a shard depend on data, checkpoint and keys alone,
so that a killed `encode` goes on where it stopped and any number of processes writes the same.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vae_dist.config.commands import EncodeCommand
from vae_dist.data.buckets import Size, aspect, nearest
from vae_dist.data.decode import size_of_sample
from vae_dist.data.reader import SampleReader, single_sample
from vae_dist.data.tar import BLOCK, DamagedSampleError
from vae_dist.inference.encoding.reading import carried, samples_in_order
from vae_dist.inference.latents import num_bytes
from vae_dist.inference.load import Images, LoadedModel, weights_digest
from vae_dist.models.vae import VAE

NAME = "latents"
MIN_SHARDS = 32  # where each has MIN_PER_SHARD images: so that many processes have work
MIN_PER_SHARD = 128
NUM_PROBED = 64  # samples whose bytes are measured
DECIDE_BYTES = (
    "content",
    "dtype",
    "flip",
    "keep_images",
    "precision",
    "seed",
    "batch_size",
    "tile",
    "weights",
    "shard_mb",
)


@dataclass(frozen=True)
class PlannedShard:
    number: int
    first: int  # number of its first sample in index order
    stop: int

    @property
    def name(self) -> str:
        return f"{NAME}-{self.number:06d}.tar"


def plan_shards(images: Images, model: VAE, command: EncodeCommand) -> list[PlannedShard]:
    """Shards of equal numbers of samples, give or take one, of about `shard_mb` each."""
    num_samples = images.index.num_samples
    total = _bytes_per_sample(images, model, command) * num_samples
    count = max(math.ceil(total / (command.shard_mb * 1e6)), _enough(num_samples))
    count = min(max(1, count), num_samples)
    borders = [num_samples * k // count for k in range(count + 1)]
    return [PlannedShard(k, low, high) for k, (low, high) in enumerate(pairwise(borders))]


def _enough(num_samples: int) -> int:
    return min(MIN_SHARDS, num_samples // MIN_PER_SHARD)


def identity(images: Images, loaded: LoadedModel, command: EncodeCommand) -> dict[str, Any]:
    """All that decides the bytes of the shards, by name; JSON."""
    settings = images.settings.without_augmentation()
    model = loaded.config
    return {
        **{key: getattr(command, key) for key in DECIDE_BYTES},
        "step": loaded.step,
        "model": weights_digest(loaded.model),
        "data": images.index.fingerprint,
        "resolution": str(model.data.resolution),
        "images": repr(dataclasses.astuple(settings)),
        "likelihood": repr((*dataclasses.astuple(model.likelihood), model.data.dequantize)),
    }


def _bytes_per_sample(images: Images, model: VAE, command: EncodeCommand) -> float:
    """Of a shard of latents, measured on some samples."""
    reader = SampleReader(images.index, images.settings, seed=0)
    num_samples = images.index.num_samples
    step = max(1, num_samples // NUM_PROBED)
    found = []
    for number in range(0, num_samples, step):
        for shard, _, data in samples_in_order(reader, number, number + 1):
            try:
                size = _size(reader, data, shard)
                _, others = carried(data, keep_images=command.keep_images)
            except DamagedSampleError:
                continue
            latent = num_bytes(
                math.prod(model.latent_shape(*size)),
                content=command.content,
                dtype=command.dtype,
                flip=command.flip,
            )
            lengths = [latent, *map(len, others.values())]
            found.append(sum(BLOCK + -(-length // BLOCK) * BLOCK for length in lengths))
    return sum(found) / len(found) if found else 1.0


def _size(reader: SampleReader, data: bytes | memoryview, shard: int) -> Size:
    """(H, W) that the image will have. Raises DamagedSampleError."""
    settings = reader.settings
    if not settings.sizes_differ:
        return settings.size
    sample = single_sample(data, reader.index.paths[shard])
    own = size_of_sample(sample, max_pixels=settings.max_pixels)
    return nearest(settings.buckets, aspect(own)) if settings.buckets else own
