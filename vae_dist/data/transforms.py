"""From a decoded image to the size that the model sees.

In: uint8 (C, H, W) of any size. Out: uint8 (C, *size): resized (antialiased) so that it covers
`size` with its shorter side, cropped and perhaps mirrored; or, with resize=False, as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import interpolate

from vae_dist.data.tar import DamagedSampleError
from vae_dist.randomness import numpy_generator


@dataclass(frozen=True)
class ImageSettings:
    """How samples become images: what a stream needs to know of `data.*`."""

    channels: int
    size: tuple[int, int]  # (H, W) of every image that a stream yields
    resize: bool  # False: the stored images have this size
    max_pixels: int
    crop: Literal["center", "random"] = "center"
    flip: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, *self.size)

    def without_augmentation(self) -> ImageSettings:
        return replace(self, crop="center", flip=False)


def transform(
    image: np.ndarray, settings: ImageSettings, *, seed: int, epoch: int, sample: int
) -> np.ndarray:
    """The image at settings.size; crop and flip are drawn by (seed, epoch, sample number)."""
    random = settings.flip or (settings.crop == "random" and settings.resize)
    generator = numpy_generator(seed, "augment", epoch, sample) if random else None
    if settings.resize:
        image = _cover(image, settings.size, max_pixels=settings.max_pixels)
        spare = [have - want for have, want in zip(image.shape[1:], settings.size, strict=True)]
        if generator is not None and settings.crop == "random":
            top, left = (int(generator.integers(n + 1)) for n in spare)
        else:
            top, left = (n // 2 for n in spare)
        image = image[:, top : top + settings.size[0], left : left + settings.size[1]]
    if generator is not None and settings.flip and generator.random() < 0.5:
        image = image[:, :, ::-1]
    return image


def _cover(image: np.ndarray, size: tuple[int, int], *, max_pixels: int) -> np.ndarray:
    """Scaled, aspect kept, to the smallest size that covers `size`."""
    height, width = image.shape[1:]
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    if scaled == (height, width):
        return image
    if scaled[0] * scaled[1] > max_pixels:
        raise DamagedSampleError(
            f"{height} x {width} pixels would become {scaled[0]} x {scaled[1]} before the crop, "
            f"more than data.max_pixels={max_pixels}"
        )
    tensor = torch.from_numpy(image.copy())[None]
    return interpolate(tensor, scaled, mode="bicubic", antialias=True)[0].numpy()
