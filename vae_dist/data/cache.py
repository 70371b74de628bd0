"""Decoded images of a data set that is small enough: each is decoded once.

In: an image as every epoch begins with it, resized and cropped, its label and stored features (of
a vision model, if any), by sample number.
Out: the same in a later epoch. What is drawn for each epoch (mirror, mask) comes afterwards, so
batches do not depend on the cache.

A data set is cached as a whole or not at all: of a larger one each epoch would push out what the
next one asks for. Every loader process caches what it has read itself; memory is taken page by
page, as images come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vae_dist.data.features import TYPE
from vae_dist.data.transforms import ImageSettings

_MISSING = np.iinfo(np.int64).min  # instead of a label


class ImageCache:
    """Images (planes, H, W), labels and features of `num_samples` samples, made by
    `settings.constant`."""

    def __init__(self, num_samples: int, settings: ImageSettings) -> None:
        constant = settings.constant
        shape = (num_samples, *constant.size, constant.planes)
        self._images = np.empty(shape, settings.dtype)
        self._labels = np.full(num_samples, _MISSING)
        self._features = np.empty((num_samples, *settings.features), TYPE)

    @classmethod
    def if_it_fits(
        cls, num_samples: int, settings: ImageSettings, *, max_bytes: int
    ) -> ImageCache | None:
        is_small = bytes_cached(num_samples, settings, cache_bytes=max_bytes, workers=1)
        return cls(num_samples, settings) if is_small else None

    def has_all(self, samples: np.ndarray) -> bool:
        return not (self._labels[samples] == _MISSING).any()

    def get(self, sample: int) -> tuple[np.ndarray, int, np.ndarray] | None:
        """Image, label and features, not to be written to; None where they are missing."""
        image, label = self._images[sample].transpose(2, 0, 1), int(self._labels[sample])
        return None if label == _MISSING else (image, label, self._features[sample])

    def put(self, sample: int, image: np.ndarray, label: int, features: np.ndarray) -> None:
        self._images[sample] = image.transpose(1, 2, 0)
        self._features[sample] = features
        self._labels[sample] = label

    def take(self, samples: np.ndarray, *, out: Sequence[np.ndarray]) -> None:
        """Of samples that are all here, images (b, H, W, planes), labels and features."""
        for array, place in zip((self._images, self._labels, self._features), out, strict=True):
            # "clip" as numpy otherwise copies twice; all numbers are of samples
            np.take(array, samples, axis=0, out=place, mode="clip")


def bytes_cached(
    num_samples: int, settings: ImageSettings, *, cache_bytes: int, workers: int
) -> int:
    """Bytes that the processes of a rank come to hold, each of which caches all or nothing; 0
    where that is more than cache_bytes, sizes differ, or each epoch crops anew."""
    if settings.sizes_differ or (settings.resize and settings.crop == "random"):
        return 0
    constant, processes = settings.constant, max(1, workers)
    num_values = math.prod(constant.size) * constant.planes
    of_features = math.prod(settings.features) * TYPE.itemsize
    num_bytes = num_samples * (num_values * constant.dtype.itemsize + 8 + of_features)
    return num_bytes * processes if num_bytes <= cache_bytes // processes else 0
