"""From a decoded image to the size that the model sees, with its mask and its label.

In: (C, H, W) of any size, uint8, uint16 or float32 in [-1, 1]. Out: (C, *size) of that type:
resized (antialiased) so that it covers `size` with its shorter side, cropped and perhaps mirrored;
or, with resize=False, as it is. With a mask, (C + 1, H, W): the last plane is 1 where a pixel was
observed, and goes where its image goes: resized, cropped and mirrored with it. Drawn masks
(`data.mask` = random, rectangle, half) are made at the final size, by (seed, epoch, sample):

    random      each pixel is missing with probability `fraction`, on its own
    rectangle   one rectangle of that part of the pixels is missing, of any place and of an aspect
                up to 2:1 (less elongated where it would not fit)
    half        the left, right, upper or lower half is missing, each as often

The label of a sample (`data.label_key`), -1 where there is none: no such member or field, or null.

    .cls    an integer
    .json   an integer, true or false; with two classes the marks -1 and 1 of attribute lists such
            as CelebA's are the classes 0 and 1
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from vae_dist.data.buckets import Size
from vae_dist.data.tar import DamagedSampleError
from vae_dist.randomness import numpy_generator

PIXEL_TYPES: dict[int, np.dtype[Any]] = {  # by data.bits; what is cut to 5 bits is stored as 8
    5: np.dtype(np.uint8),
    8: np.dtype(np.uint8),
    16: np.dtype(np.uint16),
    32: np.dtype(np.float32),
}
DRAWN = ("random", "rectangle", "half")
MAX_ASPECT = 2.0  # of a drawn rectangle
NO_LABEL = -1
CLS = "cls"


class Need(NamedTuple):
    """Pixels of the sides of the smallest image that something takes."""

    key: str  # and value, to name it by
    shorter: int = 1
    longer: int = 1
    in_evaluation: bool = False  # too


@dataclass(frozen=True)
class ImageSettings:
    """How samples become images: what a stream needs to know of `data.*`."""

    channels: int  # 0, in the decoder: as many as a file has
    size: Size  # (H, W) of every image, or of a typical one where sizes differ
    resize: bool  # False: images are taken as they are stored
    max_pixels: int
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    bits: int = 8  # of a stored value; 32: float in [-1, 1]; 0, in the decoder: those of the file
    buckets: tuple[Size, ...] = ()  # not empty: each image goes to one of these sizes
    any_size: bool = False  # with resize=False: stored sizes may differ
    mask: str = "none"
    mask_fraction: float = 0.5  # of the pixels that are missing, where masks are drawn
    label_key: str = CLS
    num_classes: int = 0  # 0: labels may be any integer
    needs: tuple[Need, ...] = ()  # of images as they are stored, with any_size
    background: str = "none"  # behind transparent pixels: white, black; none: they are refused
    image_key: str = ""  # suffix of the member that is the image; empty: the one there is
    vision: str = ""  # model whose stored features come with each image; empty: none do
    features: tuple[int, ...] = (0,)  # their shape (W, h, w), of a typical image where sizes differ

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, *self.size)

    @property
    def has_mask(self) -> bool:
        return self.mask != "none"

    @property
    def planes(self) -> int:
        """Of what a reader yields for each image: its channels, then its mask if it has one."""
        return self.channels + self.has_mask

    @property
    def dtype(self) -> np.dtype[Any]:
        return PIXEL_TYPES[self.bits]

    @property
    def sizes_differ(self) -> bool:
        return bool(self.buckets) or self.any_size

    @property
    def draws_crop(self) -> bool:
        return self.resize and self.crop == "random"

    def without_augmentation(self) -> ImageSettings:
        """As evaluation takes images, which has no use for features."""
        return replace(self, crop="center", flip=False, vision="", features=(0,))

    def too_small(self, size: Size) -> str:
        """Why a stored size (H, W) will not do; empty: it will."""
        for need in self.needs if self.any_size else ():
            is_short = min(size) < need.shorter
            if is_short or max(size) < need.longer:
                least = (
                    f"{need.shorter} on the shorter" if is_short else f"{need.longer} on the longer"
                )
                return f"{size[0]}x{size[1]} pixels, and {need.key} needs {least} side"
        return ""

    def at_one_size(self, size: Size | None = None) -> ImageSettings:
        """All images at `size`, by default the typical one, cropped from the centre."""
        plain = self.without_augmentation()
        if not self.sizes_differ and size in (None, self.size):
            return plain
        return replace(plain, size=size or self.size, resize=True, buckets=(), any_size=False)


def fit(
    image: np.ndarray, settings: ImageSettings, size: Size, generator: np.random.Generator | None
) -> np.ndarray:
    """The image at `size`, where it is not taken as stored; a random crop is the generator's first
    draw."""
    if not settings.resize:
        return image
    mask = image[settings.channels :]  # not there yet where masks are drawn
    image = _cover(image[: settings.channels], size, max_pixels=settings.max_pixels)
    if len(mask):
        height, width = image.shape[1:]
        image = np.concatenate([image, resized_mask(mask, (height, width)).astype(image.dtype)])
    spare = [have - want for have, want in zip(image.shape[1:], size, strict=True)]
    if settings.draws_crop:
        assert generator is not None
        top, left = (int(generator.integers(n + 1)) for n in spare)
    else:
        top, left = (n // 2 for n in spare)
    return image[:, top : top + size[0], left : left + size[1]]


def mirror(image: np.ndarray) -> np.ndarray:
    """Left to right. A copy of numpy's view with a negative stride takes torch's time 18-fold, and
    longer than a JPEG's decoding."""
    if image.dtype == np.uint16:  # which torch does not turn; the bytes are what counts
        return mirror(image.view(np.int16)).view(np.uint16)
    return torch.flip(_rows(image), (1,)).numpy().transpose(2, 0, 1)


def _rows(image: np.ndarray) -> torch.Tensor:
    """(H, W, C) of (C, H, W); a copy only where the image lies otherwise or must not be written."""
    return torch.from_numpy(np.require(image.transpose(1, 2, 0), requirements=["C", "W"]))


def _cover(image: np.ndarray, size: Size, *, max_pixels: int) -> np.ndarray:
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
    if image.dtype == np.uint8:
        # torch resizes bytes as they lie in most images, (H, W, C), without laying them out anew
        tensor = _rows(image).permute(2, 0, 1)[None]
        return interpolate(tensor, scaled, mode="bicubic", antialias=True)[0].numpy()
    # torch resizes no uint16; float32 holds its levels exactly
    tensor = torch.from_numpy(image.astype(np.float32))[None]
    pixels = interpolate(tensor, scaled, mode="bicubic", antialias=True)[0].numpy()
    if image.dtype == np.uint16:
        return pixels.round().clip(0, 65535).astype(np.uint16)
    return pixels.clip(-1.0, 1.0)  # a cubic overshoots at edges


def draw_mask(
    kind: str, size: Size, fraction: float, *, seed: int, epoch: int, sample: int
) -> np.ndarray:
    """One of the kinds `DRAWN`, uint8 (1, *size): 0 where a pixel is missing."""
    generator = numpy_generator(seed, "mask", epoch, sample)
    height, width = size
    if kind == "random":
        return (generator.random((1, *size)) >= fraction).astype(np.uint8)
    mask = np.ones((1, *size), np.uint8)
    if kind == "half":
        rows, columns = slice(height), slice(width)
        side = int(generator.integers(4))
        if side < 2:
            columns = slice(width // 2, width) if side else slice(width // 2)
        else:
            rows = slice(height // 2, height) if side == 3 else slice(height // 2)
    else:
        root = math.sqrt(fraction)
        steepest = min(MAX_ASPECT, 1 / fraction) if fraction else 1.0  # no side beyond the image
        stretch = steepest ** (generator.random() - 0.5)  # (h / H) / (w / W) is its square
        high = round(min(1.0, root * stretch) * height)
        wide = round(min(1.0, root / stretch) * width)
        top = int(generator.integers(height - high + 1))
        left = int(generator.integers(width - wide + 1))
        rows, columns = slice(top, top + high), slice(left, left + wide)
    mask[:, rows, columns] = 0
    return mask


def resized_mask(
    mask: np.ndarray, size: Size, *, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """The mask of an image (1, H, W) that was resized by the antialiased bicubic filter of torch or
    Pillow; box: what of it was, as (left, upper, right, lower), by default all.

    A pixel is observed where all pixels that the filter takes it from are: min-pooling, so that no
    value of a missing one leaks into what counts.
    """
    if mask.shape[1:] == size:
        return mask
    height, width = mask.shape[1:]
    left, upper, right, lower = box or (0, 0, width, height)
    missing = np.pad(np.cumsum(np.cumsum(1 - mask[0].astype(np.int64), 0), 1), ((1, 0), (1, 0)))
    first, last = _sources(height, upper, lower, size[0])
    rows = missing[last] - missing[first]
    first, last = _sources(width, left, right, size[1])
    return (rows[:, last] == rows[:, first]).astype(np.uint8)[None]


def _sources(have: int, low: float, high: float, want: int) -> tuple[np.ndarray, np.ndarray]:
    """First source and one past the last of each of `want` pixels of low to high, as the filter has
    them; Pillow keeps the ends of a box as float32."""
    start = float(np.float32(low))
    scale = (float(np.float32(high)) - start) / want
    support = 2.0 * max(scale, 1.0)
    center = start + scale * (np.arange(want) + 0.5)
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    return first, np.minimum((center + support + 0.5).astype(np.int64), have)


def label_of(sample: Mapping[str, Any], *, key: str = CLS, num_classes: int = 0) -> int:
    """Raises DamagedSampleError for what is no integer."""
    suffix, place = (CLS, ".cls") if key == CLS else ("json", f".json field {key}")
    text = sample.get(suffix)
    if text is None:
        return NO_LABEL
    try:
        value: Any = int(text) if key == CLS else json.loads(bytes(text))
    except (ValueError, RecursionError):
        wanted = "integer" if key == CLS else "JSON"
        raise DamagedSampleError(f".{suffix} is no {wanted}: {bytes(text[:20])!r}") from None
    for name in () if key == CLS else key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        return NO_LABEL
    if not isinstance(value, int) or abs(value) >= 2**63:  # bool is one
        raise DamagedSampleError(f"{place} is no integer of 64 bits: {str(value)[:20]!r}")
    return 0 if key != CLS and num_classes == 2 and value == -1 else int(value)
