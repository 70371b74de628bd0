"""Decoded images of a data set that is small enough: each is decoded once.

In: an image as every epoch begins with it, resized and cropped, and its label, by sample number.
Out: the same in a later epoch. What is drawn for each epoch (mirror, mask) comes afterwards, so
batches do not depend on the cache.

A data set is cached as a whole or not at all: of a larger one each epoch would push out what the
next one asks for. Every loader process caches what it has read itself; memory is taken page by
page, as images come.
"""

from __future__ import annotations

import math

import numpy as np

from vae_dist.data.transforms import ImageSettings

_MISSING = np.iinfo(np.int64).min  # instead of a label


class ImageCache:
    """Images (planes, H, W) and labels of `num_samples` samples, made by `settings.constant`."""

    def __init__(self, num_samples: int, settings: ImageSettings) -> None:
        constant = settings.constant
        shape = (num_samples, *constant.size, constant.planes)
        self._images = np.empty(shape, settings.dtype)
        self._labels = np.full(num_samples, _MISSING)

    @classmethod
    def if_it_fits(
        cls, num_samples: int, settings: ImageSettings, *, max_bytes: int
    ) -> ImageCache | None:
        is_small = bytes_cached(num_samples, settings, cache_bytes=max_bytes, workers=1)
        return cls(num_samples, settings) if is_small else None

    def has_all(self, samples: np.ndarray) -> bool:
        return not (self._labels[samples] == _MISSING).any()

    def get(self, sample: int) -> tuple[np.ndarray, int] | None:
        """Image, not to be written to, and label; None where they are missing."""
        label = int(self._labels[sample])
        return None if label == _MISSING else (self._images[sample].transpose(2, 0, 1), label)

    def put(self, sample: int, image: np.ndarray, label: int) -> None:
        self._images[sample] = image.transpose(1, 2, 0)
        self._labels[sample] = label

    def take(self, samples: np.ndarray, *, out: np.ndarray) -> np.ndarray:
        """The labels of samples that are all here; their images go to `out` (b, H, W, planes)."""
        # "clip" as numpy otherwise copies twice; all numbers are of samples
        np.take(self._images, samples, axis=0, out=out, mode="clip")
        labels: np.ndarray = self._labels[samples]
        return labels


def bytes_cached(
    num_samples: int, settings: ImageSettings, *, cache_bytes: int, workers: int
) -> int:
    """Bytes that the processes of a rank come to hold, each of which caches all or nothing; 0
    where that is more than cache_bytes, sizes differ, or each epoch crops anew."""
    if settings.sizes_differ or (settings.resize and settings.crop == "random"):
        return 0
    constant, processes = settings.constant, max(1, workers)
    num_values = math.prod(constant.size) * constant.planes
    num_bytes = num_samples * (num_values * constant.dtype.itemsize + 8)
    return num_bytes * processes if num_bytes <= cache_bytes // processes else 0
