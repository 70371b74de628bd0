"""One sample of a data set: from its place in the index to an image and a label.

In: (shard, index), or runs of these, which are read together. Out: undecoded samples; from one of
them the image (C, H, W) of the wanted size and the label, at once (`load`) or in two steps
(`prepare`, then `load`). What cannot be used is damaged (DamagedSampleError) or ends the run
(ShardError); that is decided here and in the decoder alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from vae_dist.data.buckets import Size, aspect, nearest
from vae_dist.data.cache import ImageCache
from vae_dist.data.decode import prepare_sample, size_of_sample
from vae_dist.data.index import Run, ShardIndex
from vae_dist.data.sources import START_RETRY_S, Range, read_ranges
from vae_dist.data.tar import DamagedSampleError, ShardError, is_metadata, key_and_suffix, members
from vae_dist.data.transforms import (
    DRAWN,
    NO_LABEL,
    ImageSettings,
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


class Prepared(NamedTuple):
    """A sample whose files were found, and whose headers were read where that is cheap."""

    decode: Callable[[], np.ndarray]
    size: Size  # that its image is brought to
    label: int
    out: np.ndarray | None


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
        """cache_bytes: a data set whose images are no more than that is decoded once. retry_s: so
        long a read that fails is tried again."""
        self.index, self.settings, self.seed, self.retry_s = index, settings, seed, retry_s
        self._first_number = (np.cumsum(index.lengths) - index.lengths).tolist()
        self._cache = ImageCache.if_it_fits(index.num_samples, settings, max_bytes=cache_bytes)
        self._constant = settings if self._cache is None else settings.constant
        self._is_drawn = settings.flip or settings.mask in DRAWN
        # an image that was decoded to its place, at its size, needs nothing more
        self._is_final = not (self._constant.flip or settings.has_mask or settings.sizes_differ)

    # reading

    def read(self, shard: int, start: int, stop: int) -> list[memoryview]:
        """The bytes of the samples start, ..., stop - 1. Raises ShardError."""
        return self.read_runs([Run(shard, start, stop)])

    def read_runs(self, runs: Sequence[Run]) -> list[memoryview]:
        """The bytes of the samples of the joined runs. Raises ShardError."""
        (found,) = self.read_many([runs])
        if isinstance(found, ShardError):
            raise found
        return found

    def read_many(self, parts: Sequence[Sequence[Run]]) -> list[list[memoryview] | ShardError]:
        """The same for each part; all are read together, so that remote ones wait but once."""
        runs = [run for part in parts for run in part]
        offsets = self.index.offsets_of(runs, retry_s=self.retry_s)
        readable = [found for found in offsets if not isinstance(found, ShardError)]
        ranges = [
            Range(self.index.paths[run.shard], int(found[0]), int(found[-1] - found[0]))
            for run, found in zip(runs, offsets, strict=True)
            if not isinstance(found, ShardError)
        ]
        blobs = iter(zip(readable, read_ranges(ranges, retry_s=self.retry_s), strict=True))
        by_run = [found if isinstance(found, ShardError) else next(blobs) for found in offsets]
        results: list[list[memoryview] | ShardError] = []
        left = iter(by_run)
        for part in parts:
            results.append(_samples([next(left) for _ in part]))
        return results

    def in_order(self, first: int, stop: int) -> list[Run]:
        """The samples first, ..., stop - 1 of the index, as runs of shards."""
        runs: list[Run] = []
        while first < stop:
            shard = int(np.searchsorted(self._first_number, first, "right")) - 1
            start = first - self._first_number[shard]
            end = min(int(self.index.lengths[shard]), start + stop - first)
            runs.append(Run(shard, start, end))
            first += end - start
        return runs

    # one sample

    def prepare(
        self,
        data: bytes | memoryview,
        shard: int,
        index: int,
        *,
        size: Size | None = None,
        out: np.ndarray | None = None,
    ) -> Prepared:
        """All that is done with an undecoded sample before its pixels are decoded.

        size: the bucket that it is brought to; by default its own, or the size of all images. out:
        (C, H, W), where the caller wants the image; it may be decoded there. Raises as `load`.
        """
        settings = self._constant
        sample = single_sample(data, self.index.paths[shard])
        if size is None and settings.buckets:
            own = size_of_sample(sample, max_pixels=settings.max_pixels)
            size = nearest(settings.buckets, aspect(own))
        size = size or settings.size
        decode = prepare_sample(
            sample,
            settings,
            at_least=size if settings.resize else None,
            out=None if settings.has_mask else out,
        )
        return Prepared(decode, size, self.label(sample, shard, index), out)

    def load(
        self,
        sample: Prepared | bytes | memoryview | None,
        shard: int,
        index: int,
        *,
        epoch: int,
    ) -> LoadedSample:
        """One sample, prepared or undecoded, as image and label. None: its image is in the cache.

        Raises DamagedSampleError when it is unreadable, and ShardError for what no replacement
        repairs: a label that is no class, native images that differ in size although they must not.
        """
        number = self._first_number[shard] + index
        if sample is None:
            assert self._cache is not None
            cached = self._cache.get(number)
            assert cached is not None, (shard, index)
            found = LoadedSample(*cached)
        else:
            if not isinstance(sample, Prepared):
                sample = self.prepare(sample, shard, index)
            found = LoadedSample(self._image(sample, shard, index, epoch=epoch), sample.label)
            if self._cache is not None:
                self._cache.put(number, *found)
        if self._cache is None or not self._is_drawn:
            return found
        image = transform(
            found.image, self.settings.drawn, seed=self.seed, epoch=epoch, sample=number
        )
        return LoadedSample(image, found.label)

    def _image(self, sample: Prepared, shard: int, index: int, *, epoch: int) -> np.ndarray:
        """Decoded and transformed, up to what is drawn for each epoch where images are cached."""
        settings, size = self._constant, sample.size
        image = sample.decode()
        if image is sample.out and self._is_final:
            return image
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
        return image

    def label(self, sample: Mapping[str, Any], shard: int, index: int) -> int:
        """-1 where there is none. Raises DamagedSampleError, and ShardError for no known class;
        without classes nothing asks for labels, and one that cannot be read is none."""
        key, num_classes = self.settings.label_key, self.settings.num_classes
        try:
            return label_of(sample, key=key, num_classes=num_classes)
        except DamagedSampleError:
            if num_classes:
                raise
            return NO_LABEL
        except UnknownClassError as error:
            raise ShardError(
                f"{self.name(shard, index)} (key {sample['__key__']}): {error}; set "
                "model.num_classes to one more than the largest label, or repair the labels"
            ) from None

    def size_or_none(self, data: bytes | memoryview, shard: int, index: int) -> Size | None:
        """(H, W) of an undecoded sample after the header of its image; None: unreadable."""
        try:
            sample = single_sample(data, self.index.paths[shard])
            return size_of_sample(sample, max_pixels=self.settings.max_pixels)
        except DamagedSampleError:
            return None

    def name(self, shard: int, index: int) -> str:
        return f"{self.index.paths[shard]} sample {index}"

    # numbers among all samples, and the cache

    def numbers(self, runs: Sequence[Run]) -> np.ndarray:
        """Numbers among all samples, int64, of the samples of the joined runs."""
        firsts = self._first_number
        return np.concatenate(
            [np.arange(firsts[shard] + start, firsts[shard] + stop) for shard, start, stop in runs]
        )

    def shards_of(self, numbers: np.ndarray) -> set[int]:
        places = np.searchsorted(self._first_number, numbers, "right") - 1
        return set(places.tolist())

    def is_cached(self, number: int) -> bool:
        return self._cache is not None and self._cache.get(number) is not None

    def are_cached(self, numbers: np.ndarray) -> bool:
        return self._cache is not None and self._cache.has_all(numbers)

    def take_cached(self, numbers: np.ndarray, *, out: np.ndarray) -> np.ndarray | None:
        """The labels of samples whose images the cache has as they are shown, and which then are
        in `out` (b, H, W, C); else None."""
        if self._cache is None or self._is_drawn or not self._cache.has_all(numbers):
            return None
        return self._cache.take(numbers, out=out)


def _samples(
    runs: list[tuple[np.ndarray, bytes | ShardError] | ShardError],
) -> list[memoryview] | ShardError:
    """The samples of joined runs, of which offsets and bytes were read, or the first error."""
    found: list[memoryview] = []
    for run in runs:
        if isinstance(run, ShardError):
            return run
        offsets, data = run
        if isinstance(data, ShardError):
            return data
        view = memoryview(data)
        found += [view[a:b] for a, b in pairwise((offsets - offsets[0]).tolist())]
    return found


def single_sample(data: bytes | memoryview, url: str) -> dict[str, Any]:
    """The one webdataset sample in these bytes: its files are views of them.

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
