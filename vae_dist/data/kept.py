"""Small data sets are decoded once: their images stay in memory, as they are before augmentation.

In: an image as every epoch begins with it, resized and cropped, and its label, by sample number.
Out: the same at a later epoch. What is drawn for each epoch (mirror, mask) comes afterwards, so
batches do not depend on what is kept.

A data set is kept as a whole or not at all: of one that is larger than the memory, each epoch would
push out what the next one asks for. Every loader process keeps what it has read itself. Memory is
taken page by page, as images come.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from vae_dist.data.transforms import DRAWN, ImageSettings

_NOT_KEPT = np.iinfo(np.int64).min  # instead of a label


class KeptImages:
    """Images (planes, H, W) and labels of `num_samples` samples. Make it by `room_for`."""

    def __init__(self, num_samples: int, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> None:
        planes, height, width = shape
        self._made_of = num_samples, shape, dtype
        self._images = np.empty((num_samples, height, width, planes), dtype)
        self._labels = np.full(num_samples, _NOT_KEPT)
        self._num_missing = num_samples

    @classmethod
    def room_for(
        cls, num_samples: int, settings: ImageSettings, *, max_bytes: int
    ) -> KeptImages | None:
        """None where they are more than max_bytes, or where each epoch crops anew."""
        num_bytes = bytes_of_all(num_samples, settings)
        if num_bytes is None or num_bytes > max_bytes:
            return None
        return cls(num_samples, _kept_shape(settings), settings.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """To a process that is not forked goes no memory, but leave to keep as much."""
        return KeptImages, self._made_of

    def has(self, sample: int) -> bool:
        return bool(self._labels[sample] != _NOT_KEPT)

    def has_all(self) -> bool:
        """Every sample of the data set."""
        return self._num_missing == 0

    def get(self, sample: int) -> tuple[np.ndarray, int] | None:
        """Image, not to be written to, and label; None where it was not kept yet."""
        if not self.has(sample):
            return None
        return self._images[sample].transpose(2, 0, 1), int(self._labels[sample])

    def get_all(self, samples: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
        """The samples' images into `pixels` (b, H, W, planes), and their labels; None, and nothing
        done, where one was not kept yet."""
        labels: np.ndarray = self._labels[samples]
        if (labels == _NOT_KEPT).any():
            return None
        # "clip" as numpy otherwise copies twice; all numbers are of samples
        np.take(self._images, samples, axis=0, out=pixels, mode="clip")
        return labels

    def keep(self, sample: int, image: np.ndarray, label: int) -> None:
        self._images[sample] = image.transpose(1, 2, 0)
        self._num_missing -= not self.has(sample)
        self._labels[sample] = label


def bytes_of_all(num_samples: int, settings: ImageSettings) -> int | None:
    """What a process takes that has kept all images; None where they cannot be kept."""
    if settings.sizes_differ or (settings.resize and settings.crop == "random"):
        return None
    return num_samples * (math.prod(_kept_shape(settings)) * settings.dtype.itemsize + 8)


def bytes_kept(num_samples: int, settings: ImageSettings, *, keep_bytes: int, workers: int) -> int:
    """What a rank with so many loader processes comes to take, each of which keeps all or none."""
    num_bytes, processes = bytes_of_all(num_samples, settings), max(1, workers)
    if num_bytes is None or num_bytes > keep_bytes // processes:
        return 0
    return num_bytes * processes


def _kept_shape(settings: ImageSettings) -> tuple[int, int, int]:
    planes = settings.channels + (settings.has_mask and settings.mask not in DRAWN)
    return (planes, *settings.size)


def before_augmentation(settings: ImageSettings) -> ImageSettings:
    """The part of the transform that is the same in every epoch, unless each crops anew."""
    mask = "none" if settings.mask in DRAWN else settings.mask
    return replace(settings, flip=False, mask=mask)


def augmentation(settings: ImageSettings) -> ImageSettings:
    """The rest of it."""
    return replace(settings, resize=False)
