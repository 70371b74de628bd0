"""Reads samples by their place in the index, and turns them into images.

In: (shard, start, stop). Out: undecoded samples, one read for the whole run; and from one
undecoded sample: image (C, H, W) of the wanted size, and label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.data.buckets import Size, aspect, make_buckets, nearest, square
from vae_dist.data.decode import decode_sample, only_jpeg, size_of_sample
from vae_dist.data.index import ShardIndex
from vae_dist.data.jpeg import is_plain_jpeg
from vae_dist.data.kept import KeptImages, augmentation, before_augmentation
from vae_dist.data.order import Run
from vae_dist.data.sources import read_range
from vae_dist.data.tar import DamagedSampleError, ShardError, is_metadata, key_and_suffix, members
from vae_dist.data.transforms import (
    CLS,
    DRAWN,
    NO_LABEL,
    ImageSettings,
    Need,
    UnknownClassError,
    label_of,
    transform,
)

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
    image: np.ndarray  # (C, H, W), uint8, uint16 or float32 after data.bits; with a mask one more
    label: int


class PlainJpeg(NamedTuple):
    """A sample that needs nothing but its decoding, where it is to stay."""

    data: bytes | memoryview
    label: int


class SampleReader:
    """Samples of a data set, read by position and made into images."""

    def __init__(
        self, index: ShardIndex, settings: ImageSettings, *, seed: int, keep_bytes: int = 0
    ) -> None:
        """keep_bytes: a data set whose images are no more than that is decoded once."""
        self.index, self.settings, self.seed = index, settings, seed
        self._first_number = (np.cumsum(index.lengths) - index.lengths).tolist()
        self._kept = KeptImages.room_for(index.num_samples, settings, max_bytes=keep_bytes)
        self._constant = before_augmentation(settings) if self._kept is not None else settings
        self._drawn = augmentation(settings)
        is_drawn = settings.flip or settings.mask in DRAWN
        # images that every epoch shows as they are kept
        self.constant = None if is_drawn else self._kept
        height, width = settings.size
        self._may_be_plain = (
            settings.dtype == np.uint8
            and not (settings.flip or settings.has_mask or settings.sizes_differ)
            and height * width <= settings.max_pixels
        )

    def read(self, shard: int, start: int, stop: int) -> list[memoryview]:
        """The bytes of the samples start, ..., stop - 1: views of one read. Raises ShardError."""
        path = self.index.paths[shard]
        try:
            offsets = self.index.offsets(shard, start, stop)
            first, end = int(offsets[0]), int(offsets[-1])
            blob = memoryview(read_range(path, first, end - first))
        except OSError as error:
            raise ShardError(
                f"{path}: cannot be read ({error.strerror}); put it back or repair it, then run "
                "the same command again"
            ) from error
        borders = (offsets - first).tolist()
        return [blob[a:b] for a, b in pairwise(borders)]

    def load(
        self,
        data: bytes | memoryview,
        shard: int,
        index: int,
        *,
        epoch: int,
        room: np.ndarray | None = None,
        size: Size | None = None,
    ) -> LoadedSample:
        """One sample, decoded and transformed; in `room` where that saves a copy.

        size: the bucket that it is brought to; by default its own, or the size of all images.
        Raises DamagedSampleError when it is unreadable, and ShardError for what no other sample
        can make good: a label that is no class, native images that differ in size although they
        must not.
        """
        found = self._decoded(data, shard, index, epoch=epoch, room=room, size=size)
        if self._kept is None:
            return found
        self._kept.keep(self._first_number[shard] + index, *found)
        return self._augmented(found, shard, index, epoch=epoch)

    def has_kept(self, shard: int, index: int) -> bool:
        return self._kept is not None and self._kept.has(self._first_number[shard] + index)

    def keep(self, shard: int, index: int, image: np.ndarray, label: int) -> None:
        """An image (C, H, W) that was decoded elsewhere, where a later epoch wants it."""
        if self._kept is not None:
            self._kept.keep(self._first_number[shard] + index, image, label)

    def kept(self, shard: int, index: int, *, epoch: int) -> LoadedSample | None:
        """What `load` would make of the sample, without its bytes, if an earlier epoch kept it."""
        found = None
        if self._kept is not None:
            found = self._kept.get(self._first_number[shard] + index)
        return None if found is None else self._augmented(found, shard, index, epoch=epoch)

    def numbers(self, runs: Iterable[Run]) -> np.ndarray:
        """Numbers among all samples, int64, of the samples of the joined runs."""
        firsts = self._first_number
        return np.concatenate(
            [np.arange(firsts[shard] + start, firsts[shard] + stop) for shard, start, stop in runs]
        )

    def shards_of(self, numbers: np.ndarray) -> set[int]:
        places = np.searchsorted(self._first_number, numbers, "right") - 1
        return set(places.tolist())

    def _augmented(
        self, constant: tuple[np.ndarray, int], shard: int, index: int, *, epoch: int
    ) -> LoadedSample:
        image, label = constant
        number = self._first_number[shard] + index
        image = transform(image, self._drawn, seed=self.seed, epoch=epoch, sample=number)
        return LoadedSample(image, label)

    def _decoded(
        self,
        data: bytes | memoryview,
        shard: int,
        index: int,
        *,
        epoch: int,
        room: np.ndarray | None,
        size: Size | None,
    ) -> LoadedSample:
        """Decoded and transformed, up to what is drawn for each epoch where images are kept."""
        settings = self._constant
        sample = single_sample(data, self.index.paths[shard])
        if size is None and settings.buckets:
            own = size_of_sample(sample, max_pixels=settings.max_pixels)
            size = nearest(settings.buckets, aspect(own))
        size = size or settings.size
        image = decode_sample(
            sample,
            channels=settings.channels,
            bits=settings.bits,
            max_pixels=settings.max_pixels,
            at_least=size if settings.resize else None,
            room=None if settings.has_mask else room,
            mask=settings.mask,
        )
        number = self._first_number[shard] + index
        image = transform(image, settings, seed=self.seed, epoch=epoch, sample=number, size=size)
        height, width = image.shape[1:]
        if (height, width) != size and not settings.any_size:
            raise ShardError(
                f"{self.name(shard, index)}: the image is {in_words((height, width))} pixels, but "
                f"the first one of its data set is {in_words(size)}; {ways_to_one_size(size)}"
            )
        if problem := settings.too_small((height, width)):
            raise DamagedSampleError(f"too small: {problem}")
        return LoadedSample(image, self.label(sample, shard, index))

    def plain_jpeg(self, data: bytes | memoryview, shard: int, index: int) -> PlainJpeg | None:
        """A sample whose image `decode_into` makes of its bytes as `load` would, or None.

        Short, as it is run between the decoding of two images, when no cache holds it. Raises
        ShardError for a label that is no class.
        """
        if not self._may_be_plain:
            return None
        try:
            sample = single_sample(data, self.index.paths[shard], copied=False)
            jpeg = only_jpeg(sample)
            if jpeg is None or not is_plain_jpeg(jpeg, self.settings.channels, self.settings.size):
                return None
            return PlainJpeg(jpeg, self.label(sample, shard, index))
        except DamagedSampleError:
            return None  # load says why

    def label(self, sample: Mapping[str, Any], shard: int, index: int) -> int:
        """-1 where there is none. Raises DamagedSampleError, and ShardError for no known class."""
        key, num_classes = self.settings.label_key, self.settings.num_classes
        try:
            return label_of(sample, key=key, num_classes=num_classes)
        except UnknownClassError as error:
            raise ShardError(
                f"{self.name(shard, index)} (key {sample['__key__']}): {error}; set "
                "model.num_classes to one more than the largest label, or mend the labels"
            ) from None

    def size_or_none(self, data: bytes | memoryview, shard: int) -> Size | None:
        """(H, W) of an undecoded sample after the header of its image; None: unreadable."""
        try:
            sample = single_sample(data, self.index.paths[shard])
            return size_of_sample(sample, max_pixels=self.settings.max_pixels)
        except DamagedSampleError:
            return None

    def name(self, shard: int, index: int) -> str:
        return f"{self.index.paths[shard]} sample {index}"


def single_sample(data: bytes | memoryview, url: str, *, copied: bool = True) -> dict[str, Any]:
    """The one webdataset sample in these bytes. Raises DamagedSampleError.

    webdataset's `group_by_keys`, for bytes of which it is known that they hold one group.
    copied=False: files are views of `data`.
    """
    sample: dict[str, Any] = {}
    for name, content in members(data):
        key, suffix = key_and_suffix(name)
        if key is None or is_metadata(name):
            continue
        suffix = suffix.lower()
        if sample.setdefault("__key__", key) != key:
            raise DamagedSampleError("the index does not fit the shard here")
        if suffix in sample:
            raise DamagedSampleError(f"{name}: duplicate file name in tar file {suffix}")
        sample[suffix] = bytes(content) if copied else content
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
    bits: int = 8,
    crop: Any = "center",
    flip: bool = False,
    any_size: bool = False,
    mask: str = "none",
    mask_fraction: float = 0.5,
    label_key: str = CLS,
    num_classes: int = 0,
    needs: tuple[Need, ...] = (),
) -> ImageSettings:
    """Settings after `data.*`; the size of native images is that of the first readable one.

    any_size: native images may differ in size, and those below `needs` are not taken. Raises
    ConfigError when none of the first samples can be used.
    """
    common = ImageSettings(
        channels,
        (0, 0),
        True,
        max_pixels,
        crop,
        flip,
        bits,
        mask=mask,
        mask_fraction=mask_fraction,
        label_key=label_key,
        num_classes=num_classes,
    )
    if isinstance(resolution, Mapping):
        buckets = make_buckets(**resolution)
        return replace(common, size=square(buckets), buckets=buckets)
    if resolution != "native":
        size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        return replace(common, size=(size[0], size[1]))
    reason = ""
    for shard, number in _first_samples(index, NUM_PROBED):
        reader = SampleReader(index, common, seed=0)
        data = reader.read(shard, number, number + 1)[0]
        try:
            sample = single_sample(data, index.paths[shard])
            image = decode_sample(
                sample, channels=channels, bits=bits, max_pixels=max_pixels, mask=mask
            )
        except DamagedSampleError as error:
            reason = reason or f"{reader.name(shard, number)}: {error}"
            continue
        height, width = image.shape[1:]
        native = replace(common, size=(height, width), resize=False, any_size=any_size, needs=needs)
        if problem := native.too_small(native.size):
            reason = reason or f"{reader.name(shard, number)}: {problem}"
            continue
        return native
    raise ConfigError(f"data.resolution=native: none of the first images can be used; {reason}")


def check_labels(index: ShardIndex, settings: ImageSettings, *, key: str) -> None:
    """Look at the labels of the first samples. Raises ConfigError, which blames `key`, when none of
    them has a label, and ShardError when one has a label that is no class."""
    reader = SampleReader(index, settings, seed=0)
    labels = []
    for shard, number in _first_samples(index, NUM_PROBED):
        with contextlib.suppress(DamagedSampleError):
            data = reader.read(shard, number, number + 1)[0]
            sample = single_sample(data, index.paths[shard])
            labels.append(reader.label(sample, shard, number))
    if labels and all(label == NO_LABEL for label in labels):
        raise ConfigError(
            f"model.num_classes={settings.num_classes}, but none of the first {len(labels)} images "
            f"of {key} has a label under data.label_key={settings.label_key}; name the field that "
            "holds it, or set model.num_classes=0"
        )


def _first_samples(index: ShardIndex, count: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for shard, length in enumerate(index.lengths.tolist()):
        found += [(shard, i) for i in range(min(length, count - len(found)))]
        if len(found) == count:
            break
    return found


# words


def in_words(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def ways_to_one_size(size: Size) -> str:
    """What to do where native images of about that size must share one and do not."""
    return (
        "here native images share a size: bring them to one, for example "
        f"data.resolution={min(size)}, or, with model.latent=spatial, use aspect buckets "
        "(data.resolution={area: ..., multiple: ..., max_aspect: ...}), or let each image be a "
        "slot of its own with data.slots=training.batch_size (and, with runtime.parallel=fsdp, "
        "training.microbatch_size=1)"
    )
