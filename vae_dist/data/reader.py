"""Reads samples by their place in the index, and turns them into images.

In: (shard, start, stop). Out: undecoded samples, one read for the whole run; and from one
undecoded sample: uint8 image (C, H, W) of the wanted size, and label.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import decode_sample
from vae_dist.data.index import ShardIndex
from vae_dist.data.remote import read_range
from vae_dist.data.tar import DamagedSampleError, ShardError, key_and_suffix, members
from vae_dist.data.transforms import ImageSettings, transform

NUM_PROBED = 100  # samples that are tried for the size of native images


@dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be read; training shows `replaced_by` in its place."""

    shard: str
    index: int  # in the shard
    reason: str
    replaced_by: str | None

    def __str__(self) -> str:
        instead = f"; in its place: {self.replaced_by}" if self.replaced_by else ""
        return f"{self.shard} sample {self.index}: {self.reason}{instead}"


class LoadedSample(NamedTuple):
    image: np.ndarray  # uint8 (C, H, W)
    label: int


class SampleReader:
    """Samples of a data set, read by position and made into images."""

    def __init__(self, index: ShardIndex, settings: ImageSettings, *, seed: int) -> None:
        self.index, self.settings, self.seed = index, settings, seed
        self._first_number = (np.cumsum(index.lengths) - index.lengths).tolist()
        self._shape = settings.shape

    def read(self, shard: int, start: int, stop: int) -> list[bytes]:
        """The bytes of the samples start, ..., stop - 1, by one read. Raises ShardError."""
        path = self.index.paths[shard]
        try:
            offsets = self.index.offsets(shard, start, stop)
            blob = read_range(path, int(offsets[0]), int(offsets[-1] - offsets[0]))
        except OSError as error:
            raise ShardError(
                f"{path}: cannot be read ({error.strerror}); put it back or repair it, then run "
                "the same command again"
            ) from error
        borders = (offsets - offsets[0]).tolist()
        return [blob[a:b] for a, b in pairwise(borders)]

    def load(
        self, data: bytes, shard: int, index: int, *, epoch: int, room: np.ndarray | None = None
    ) -> LoadedSample:
        """One sample, decoded and transformed; in `room` where that saves a copy.

        Raises DamagedSampleError when it is unreadable, and ShardError when native images differ
        in size, which no other sample can make good.
        """
        settings = self.settings
        image, label = decode_sample(
            single_sample(data, self.index.paths[shard]),
            channels=settings.channels,
            max_pixels=settings.max_pixels,
            at_least=settings.size if settings.resize else None,
            room=room,
        )
        number = self._first_number[shard] + index
        image = transform(image, settings, seed=self.seed, epoch=epoch, sample=number)
        if image.shape != self._shape:
            raise ShardError(
                f"{self.index.paths[shard]} sample {index}: the image is {_size(image.shape[1:])} "
                f"pixels, but the first one of its data set is {_size(settings.size)}; with "
                "data.resolution=native images share a size, else train with one, for example "
                f"data.resolution={min(settings.size)}"
            )
        return LoadedSample(image, label)

    def name(self, shard: int, index: int) -> str:
        return f"{self.index.paths[shard]} sample {index}"


def single_sample(data: bytes, url: str) -> dict[str, Any]:
    """The one webdataset sample in these bytes. Raises DamagedSampleError.

    webdataset's `group_by_keys`, for bytes of which it is known that they hold one group.
    """
    sample: dict[str, Any] = {}
    for name, content in members(data):
        key, suffix = key_and_suffix(name)
        if key is None:
            continue
        suffix = suffix.lower()
        if sample.setdefault("__key__", key) != key:
            raise DamagedSampleError("the index does not fit the shard here")
        if suffix in sample:
            raise DamagedSampleError(f"{name}: duplicate file name in tar file {suffix}")
        sample[suffix] = content
    if len(sample) < 2:
        raise DamagedSampleError("the index does not fit the shard here")
    sample["__url__"] = url
    return sample


def image_settings(
    index: ShardIndex,
    *,
    channels: int,
    resolution: Any,
    max_pixels: int,
    crop: Any = "center",
    flip: bool = False,
) -> ImageSettings:
    """Settings after `data.*`; the size of native images is that of the first readable one.

    Raises ConfigError when none of the first samples can be read.
    """
    if resolution != "native":
        size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        return ImageSettings(channels, (size[0], size[1]), True, max_pixels, crop, flip)
    reason = ""
    for shard, number in _first_samples(index, NUM_PROBED):
        reader = SampleReader(index, ImageSettings(channels, (0, 0), False, max_pixels), seed=0)
        data = reader.read(shard, number, number + 1)[0]
        try:
            sample = single_sample(data, index.paths[shard])
            image, _ = decode_sample(sample, channels=channels, max_pixels=max_pixels)
        except DamagedSampleError as error:
            reason = reason or f"{reader.name(shard, number)}: {error}"
            continue
        height, width = image.shape[1:]
        return ImageSettings(channels, (height, width), False, max_pixels, crop, flip)
    raise ConfigError(f"data.resolution=native: none of the first images can be read; {reason}")


def _first_samples(index: ShardIndex, count: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for shard, length in enumerate(index.lengths.tolist()):
        found += [(shard, i) for i in range(min(length, count - len(found)))]
        if len(found) == count:
            break
    return found


def _size(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
