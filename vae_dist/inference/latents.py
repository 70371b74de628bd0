"""Latents of one image as a member of a WebDataset sample, and samples that hold such a member.

`KEY.latent.safetensors` is a safetensors file (bfloat16 too, which numpy has no type for):

    mean, log_variance    of q(z|x), each of the latent's shape     (content moments)
    mean                                                            (content mean)
    sample                a draw of q(z|x)                          (content sample)
    image_size            int32 (2,): height and width of the image in pixels
    mean_flip, ...        the same of the mirrored image, where asked for

In: tensors, or shards of latents. Out: bytes, or `LatentSample`s in index order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.data.index import ShardIndex
from vae_dist.data.reader import SampleReader, single_sample
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import NO_LABEL, ImageSettings
from vae_dist.inference import tiles
from vae_dist.models.vae import VAE
from vae_dist.tracking.images import to_uint8

MEMBER = "latent.safetensors"
IMAGE_SIZE = "image_size"
MIRRORED = "_flip"  # what names of tensors of the mirrored image end in
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEADER_BYTES = 256  # of the member, about
READ_TOGETHER = 64  # samples


class LatentSample(NamedTuple):
    number: int  # in index order
    key: str
    latent: Tensor  # of the type that is stored: the mean, or the draw that is stored instead
    image_size: tuple[int, int]
    label: int  # -1 where there is none


def to_bytes(tensors: Mapping[str, Tensor], image_size: tuple[int, int]) -> bytes:
    size = torch.tensor(image_size, dtype=torch.int32)
    return safetensors.torch.save(
        {**{name: tensor.contiguous() for name, tensor in tensors.items()}, IMAGE_SIZE: size}
    )


def from_bytes(data: bytes) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The tensors and (H, W) of the image. Raises DamagedSampleError."""
    try:
        tensors = safetensors.torch.load(data)
        height, width = tensors.pop(IMAGE_SIZE).tolist()
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DamagedSampleError(f"no latents in .{MEMBER} ({error})") from None
    return tensors, (height, width)


def num_bytes(num_values: int, *, content: str, dtype: str, flip: bool) -> int:
    """Of the member of an image with so many latent values, about."""
    per_image = (2 if content == "moments" else 1) * (2 if flip else 1)
    return num_values * TYPES[dtype].itemsize * per_image + HEADER_BYTES


def read_latents(
    index: ShardIndex, model: VAE, config: TrainConfig, *, num_images: int
) -> Iterator[LatentSample]:
    """The first `num_images` samples. Raises ConfigError, which names the sample, where one holds
    no latent that `model` could decode."""
    settings = ImageSettings(
        config.data.channels,
        (1, 1),
        True,
        config.data.max_pixels,
        label_key=config.data.label_key,
        num_classes=config.model.num_classes,
    )
    reader = SampleReader(index, settings, seed=0)
    count = min(num_images, index.num_samples)
    number = 0
    for first in range(0, count, READ_TOGETHER):
        for run in reader.in_order(first, min(first + READ_TOGETHER, count)):
            for place, data in enumerate(reader.read(*run), run.start):
                try:
                    yield _latent_sample(reader, data, run.shard, place, number, model)
                except DamagedSampleError as error:
                    raise ConfigError(
                        f"data: {reader.name(run.shard, place)}: {error}; give shards that "
                        "`python -m vae_dist.encode` made with this run"
                    ) from None
                number += 1


def _latent_sample(
    reader: SampleReader, data: bytes | memoryview, shard: int, place: int, number: int, model: VAE
) -> LatentSample:
    sample = single_sample(data, reader.index.paths[shard])
    if MEMBER not in sample:
        raise DamagedSampleError(f"it has no .{MEMBER}")
    tensors, size = from_bytes(bytes(sample[MEMBER]))
    latent = tensors.get("mean", tensors.get("sample"))
    if latent is None:
        raise DamagedSampleError(f"its .{MEMBER} holds neither mean nor sample")
    if model.image_size in (None, size):
        expected = model.latent_shape(*size)
        if tuple(latent.shape) == expected:
            label = reader.label(sample, shard, place) if model.num_classes else NO_LABEL
            return LatentSample(number, sample["__key__"], latent, size, label)
    raise DamagedSampleError(
        f"its latent of shape {tuple(latent.shape)}, for an image of {size[0]} x {size[1]} pixels, "
        "does not fit this model"
    )


@torch.inference_mode()
def decode_latents(
    model: VAE, samples: Iterable[LatentSample], *, batch_size: int, tile: int = 0
) -> Iterator[tuple[LatentSample, Tensor]]:
    """Each sample with the mean of p(x|z), uint8 (C, H, W) on CPU, in order. Neighbours of one
    image size go through the network together, large ones in tiles of `tile` pixels."""
    device = next(model.parameters()).device
    for size, same in groupby(samples, key=lambda sample: sample.image_size):
        while batch := list(islice(same, batch_size)):
            z = torch.stack([sample.latent for sample in batch]).float().to(device)
            labels = torch.tensor([sample.label for sample in batch], device=device)
            params = tiles.decode(model, z, size, tile=tile, labels=labels)
            means = model.likelihood.mean(params)
            yield from zip(batch, to_uint8(means).cpu(), strict=True)
