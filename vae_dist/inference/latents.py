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
from dataclasses import replace
from itertools import groupby, islice
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.data.index import load_index
from vae_dist.data.reader import single_sample
from vae_dist.data.settings import image_settings
from vae_dist.data.tar import DamagedSampleError
from vae_dist.inference.load import Images
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.vae import VAE

MEMBER = "latent.safetensors"
IMAGE_SIZE = "image_size"
MIRRORED = "_flip"  # what names of tensors of the mirrored image end in
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEADER_BYTES = 256  # of the member, about
READ_TOGETHER = 64  # samples


class LatentSample(NamedTuple):
    number: int  # in index order
    key: str
    latent: Tensor  # float32: the mean, or the draw that is stored instead
    image_size: tuple[int, int]
    label: int  # -1 where there is none


def to_bytes(tensors: Mapping[str, Tensor], image_size: tuple[int, int]) -> bytes:
    size = torch.tensor(image_size, dtype=torch.int32)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save({**stored, IMAGE_SIZE: size})


def from_bytes(data: bytes) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The tensors and (H, W) of the image. Raises DamagedSampleError."""
    try:
        tensors = safetensors.torch.load(data)
        height, width = map(int, tensors.pop(IMAGE_SIZE))
        if not all(t.is_floating_point() and t.isfinite().all() for t in tensors.values()):
            raise ValueError("its values are no finite numbers")
    except Exception as error:  # whatever a decoder raises is damage
        raise DamagedSampleError(f"no latents in .{MEMBER} ({error})") from None
    return tensors, (height, width)


def num_bytes(num_values: int, *, content: str, dtype: str, flip: bool) -> int:
    """Of the member of an image with so many latent values, about."""
    per_image = (2 if content == "moments" else 1) * (2 if flip else 1)
    return num_values * TYPES[dtype].itemsize * per_image + HEADER_BYTES


def open_latents(config: TrainConfig, data: Any) -> Images:
    """Shards of latents, made by a run of this config. Raises ConfigError."""
    index = load_index(data, key="data", create=True)
    keys = replace(config.data, resolution=1)  # no image is read to find its size
    settings = image_settings(index, keys, num_classes=config.model.num_classes)
    return Images(index, settings, config.data.retry_s)


def read_latents(images: Images, model: VAE, *, num_images: int) -> Iterator[LatentSample]:
    """The first `num_images` samples of shards of latents. Raises ConfigError, which names the
    sample, where one holds no latent that `model` could decode."""
    reader, count = images.reader(), min(num_images, images.index.num_samples)
    number = 0
    for first in range(0, count, READ_TOGETHER):
        for run in reader.in_order(first, min(first + READ_TOGETHER, count)):
            for place, data in enumerate(reader.read([run]), run.start):
                try:
                    sample = single_sample(data, images.index.paths[run.shard])
                    latent, size = _latent(sample, model)
                    label = reader.label(sample, run.shard, place)
                except DamagedSampleError as error:
                    raise ConfigError(
                        f"data: {reader.name(run.shard, place)}: {error}; give shards that "
                        "`python -m vae_dist.encode` made with this run"
                    ) from None
                yield LatentSample(number, sample["__key__"], latent, size, label)
                number += 1


def _latent(sample: Mapping[str, Any], model: VAE) -> tuple[Tensor, tuple[int, int]]:
    """Mean, or the draw that is stored instead, and (H, W) of the image. Raises
    DamagedSampleError."""
    if MEMBER not in sample:
        raise DamagedSampleError(f"it has no .{MEMBER}")
    tensors, size = from_bytes(bytes(sample[MEMBER]))
    latent = tensors.get("mean", tensors.get("sample"))
    if latent is None:
        raise DamagedSampleError(f"its .{MEMBER} holds neither mean nor sample")
    if model.image_size not in (None, size) or tuple(latent.shape) != model.latent_shape(*size):
        raise DamagedSampleError(
            f"its latent of shape {tuple(latent.shape)}, for an image of {size[0]} x {size[1]} "
            "pixels, does not fit this model"
        )
    return latent.float(), size


@torch.inference_mode()
def decode_latents(
    model: VAE, samples: Iterable[LatentSample], *, batch_size: int, tile: int = 0
) -> Iterator[tuple[LatentSample, Tensor]]:
    """Each sample with the mean of p(x|z), float32 (C, H, W) in [-1, 1] on CPU, in order.
    Neighbours of one image size go through the network together, large ones in tiles of `tile`
    pixels."""
    for size, same in groupby(samples, key=lambda sample: sample.image_size):
        while batch := list(islice(same, batch_size)):
            z = torch.stack([sample.latent for sample in batch])
            labels = torch.tensor([sample.label for sample in batch])
            means = BatchedVAE(model, tile=tile).decode(z, size, labels)
            yield from zip(batch, means, strict=True)
