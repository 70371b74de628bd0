"""One sample of a data set: from its place in the index to an image and a label.

In: (shard, index), or runs of these, which are read together. Out: undecoded samples; of one of
them the image (C, H, W) of the wanted size, the label and stored features. What cannot be used is
damaged (DamagedSampleError) or ends the run (ShardError); that is decided here and in the decoder
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from vae_dist.data.buckets import Size, aspect, nearest
from vae_dist.data.decode import decode_sample, size_of_sample
from vae_dist.data.features import MEMBER, NO_FEATURES, Features, in_text
from vae_dist.data.index import Run, ShardIndex
from vae_dist.data.sources import START_RETRY_S, Range, read_ranges
from vae_dist.data.tar import DamagedSampleError, ShardError, is_metadata, key_and_suffix, members
from vae_dist.data.transforms import (
    DRAWN,
    NO_LABEL,
    ImageSettings,
    draw_mask,
    fit,
    label_of,
    mirror,
)
from vae_dist.randomness import numpy_generator

Samples = list[memoryview]  # undecoded
OVERHEAD_BYTES = 300  # of Python's objects, for each cached sample


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
    features: np.ndarray = NO_FEATURES  # float16 (W, h, w), where they are asked for


class SampleReader:
    """Samples of a data set, read by position and made into images."""

    def __init__(
        self,
        index: ShardIndex,
        settings: ImageSettings,
        *,
        seed: int,
        cache_bytes: int = 0,
        retry_s: float = START_RETRY_S,
    ) -> None:
        """cache_bytes: of decoded images, which are kept as long as they fit, before what is drawn
        for each epoch. retry_s: so long a read that fails is tried again."""
        self.index, self.settings, self.seed, self.retry_s = index, settings, seed, retry_s
        self._first_number = np.cumsum(index.lengths) - index.lengths
        self._cache: dict[int, LoadedSample] = {}  # by number among all samples
        is_constant = not settings.sizes_differ and not settings.draws_crop
        self._cache_bytes_left = cache_bytes if is_constant else 0

    # bytes

    def read(self, runs: Sequence[Run]) -> Samples:
        """The bytes of the samples of the joined runs. Raises ShardError."""
        return self.read_many([runs])[0]

    def read_many(self, parts: Sequence[Sequence[Run]]) -> list[Samples]:
        """The same for each part; all are read together, so that remote ones wait but once."""
        runs = [run for part in parts for run in part]
        offsets = self.index.offsets(runs, retry_s=self.retry_s)
        ranges = [
            Range(self.index.paths[run.shard], int(found[0]), int(found[-1] - found[0]))
            for run, found in zip(runs, offsets, strict=True)
        ]
        blobs = read_ranges(ranges, retry_s=self.retry_s)
        by_run = (
            [memoryview(blob)[a:b] for a, b in pairwise((found - found[0]).tolist())]
            for blob, found in zip(blobs, offsets, strict=True)
        )
        return [[sample for _ in part for sample in next(by_run)] for part in parts]

    def in_order(self, first: int, stop: int) -> list[Run]:
        """The samples first, ..., stop - 1 of the index, as runs of shards."""
        runs: list[Run] = []
        while first < stop:
            shard = int(np.searchsorted(self._first_number, first, "right")) - 1
            start = first - int(self._first_number[shard])
            end = min(int(self.index.lengths[shard]), start + stop - first)
            runs.append(Run(shard, start, end))
            first += end - start
        return runs

    # one sample

    def load(
        self,
        data: bytes | memoryview | None,
        shard: int,
        index: int,
        *,
        epoch: int,
        size: Size | None = None,
    ) -> LoadedSample:
        """One sample of its undecoded bytes, which a cached one (`is_cached`) does without.

        size: the bucket that it is brought to; by default its own, or the size of all images.
        Raises DamagedSampleError when it is unreadable, and ShardError for what no replacement
        repairs: a label that is no class, native images that differ in size although they must not,
        features of another model or image.
        """
        settings, number = self.settings, int(self._first_number[shard]) + index
        generator = None
        if settings.flip or settings.draws_crop:
            generator = numpy_generator(self.seed, "augment", epoch, number)
        found = self._cache.get(number)
        if found is None:
            assert data is not None, (shard, index)
            found = self._decoded(data, shard, index, size, generator)
            num_bytes = found.image.nbytes + found.features.nbytes + OVERHEAD_BYTES
            if num_bytes <= self._cache_bytes_left:
                self._cache_bytes_left -= num_bytes
                self._cache[number] = found
        image, label, features = found
        if settings.flip and generator is not None and generator.random() < 0.5:
            image, features = mirror(image), features[..., ::-1]
        if settings.mask in DRAWN:
            wanted = (image.shape[1], image.shape[2])
            place = {"seed": self.seed, "epoch": epoch, "sample": number}
            mask = draw_mask(settings.mask, wanted, settings.mask_fraction, **place)
            image = np.concatenate([image, mask.astype(image.dtype)])
        return LoadedSample(image, label, features)

    def _decoded(
        self,
        data: bytes | memoryview,
        shard: int,
        index: int,
        size: Size | None,
        generator: np.random.Generator | None,
    ) -> LoadedSample:
        settings, sample = self.settings, single_sample(data, self.index.paths[shard])
        if size is None and settings.buckets:
            size = nearest(settings.buckets, aspect(self._stored_size(sample)))
        size = size or settings.size
        label = self.label(sample, shard, index)
        image = decode_sample(sample, settings, at_least=size if settings.resize else None)
        image = fit(image, settings, size, generator)
        self._check_size(image, size, shard, index)
        return LoadedSample(image, label, self._features(sample.get(MEMBER), image, shard, index))

    def _features(
        self, member: bytes | None, image: np.ndarray, shard: int, index: int
    ) -> np.ndarray:
        settings, size = self.settings, in_text((image.shape[1], image.shape[2]))
        if not settings.vision:
            return NO_FEATURES
        if member is None:
            name = self.name(shard, index)
            raise ShardError(f"{name}: mix no shards with .{MEMBER} and without")
        found = Features.from_bytes(member)
        if found[1:] != (settings.vision, size, settings.image_key):
            raise ShardError(
                f"{self.name(shard, index)}: its features are of {found[1:]}, this run wants "
                f"{(settings.vision, size, settings.image_key)} (model, size, image_key); make "
                "them with `encode features=` as in this run, or give the shards without"
            )
        same = 1 if settings.sizes_differ else 3  # dimensions
        if found.values.shape[:same] != settings.features[:same]:
            raise DamagedSampleError(f"features of shape {found.values.shape}")
        return found.values

    def _check_size(self, image: np.ndarray, wanted: Size, shard: int, index: int) -> None:
        size = image.shape[1], image.shape[2]
        if size != wanted and not self.settings.any_size:
            raise ShardError(
                f"{self.name(shard, index)}: the image is {in_text(size)} pixels, but the first "
                f"one is {in_text(wanted)}; {ways_to_one_size(wanted)}"
            )
        if problem := self.settings.too_small(size):
            raise DamagedSampleError(f"too small: {problem}")

    def label(self, sample: Mapping[str, Any], shard: int, index: int) -> int:
        """-1 where there is none. Raises DamagedSampleError, and ShardError for no known class;
        without classes nothing asks for labels, and one that cannot be read is none."""
        key, num_classes = self.settings.label_key, self.settings.num_classes
        try:
            label = label_of(sample, key=key, num_classes=num_classes)
        except DamagedSampleError:
            if num_classes:
                raise
            return NO_LABEL
        if num_classes and not NO_LABEL <= label < num_classes:
            raise ShardError(
                f"{self.name(shard, index)} (key {sample['__key__']}): its label {label} is none "
                f"of the classes of model.num_classes={num_classes}; set that to one more than the "
                "largest label, or repair the labels"
            )
        return label

    def size_or_none(self, data: bytes | memoryview, shard: int) -> Size | None:
        """(H, W) of an undecoded sample after the header of its image; None: unreadable."""
        try:
            return self._stored_size(single_sample(data, self.index.paths[shard]))
        except DamagedSampleError:
            return None

    def _stored_size(self, sample: Mapping[str, Any]) -> Size:
        max_pixels, key = self.settings.max_pixels, self.settings.image_key
        return size_of_sample(sample, max_pixels=max_pixels, image_key=key)

    def name(self, shard: int, index: int) -> str:
        return f"{self.index.paths[shard]} sample {index}"

    def is_cached(self, shard: int, index: int) -> bool:
        return int(self._first_number[shard]) + index in self._cache


def single_sample(data: bytes | memoryview, url: str) -> dict[str, Any]:
    """The one webdataset sample in these bytes.

    webdataset's `group_by_keys`, for bytes of which it is known that they hold one group. Raises
    DamagedSampleError.
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
        sample[suffix] = content
    if len(sample) < 2:
        raise DamagedSampleError("the index does not fit the shard here")
    sample["__url__"] = url
    return sample


def ways_to_one_size(size: Size) -> str:
    """What to do where native images of about that size must share one and do not."""
    return (
        f"here they share a size: set data.resolution={min(size)}, or, with model.latent=spatial, "
        "aspect buckets or data.slots=training.batch_size"
    )
