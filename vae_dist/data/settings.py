"""How samples become images, from the config and from what the first samples say, before training.

In: `data.*` and an index. Out: `ImageSettings`, or an error for what would stop the run later: no
first sample can be used, no image has a label, native images differ in size although they must
not, or too many are too small. What is not among those that are looked at, the reader finds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.data.buckets import Size, make_buckets, square
from vae_dist.data.decode import decode_sample
from vae_dist.data.index import NUM_THREADS, ShardIndex
from vae_dist.data.reader import SampleReader, in_words, single_sample, ways_to_one_size
from vae_dist.data.sources import is_pipe, is_remote
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import CLS, NO_LABEL, ImageSettings, Need

NUM_PROBED = 100  # samples that are tried for the size of native images
NUM_LOOKED_AT = 256  # finds a size that one image in a hundred has in 92 of 100 data sets
NUM_REMOTE = 32  # where each takes two requests
MAX_BYTES = 2**26  # of these images together
NUM_NAMED = 2


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
    for shard, number in first_samples(index, NUM_PROBED):
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


def check_readable(index: ShardIndex, settings: ImageSettings, *, key: str) -> None:
    """Raises ConfigError, which blames `key`, with the reason of the first sample when none of the
    first ones can be read: that is not damage but the wrong kind of data."""
    reader, reason, count = SampleReader(index, settings, seed=0), "", 0
    for shard, number in first_samples(index, NUM_PROBED):
        try:
            reader.load(reader.read(shard, number, number + 1)[0], shard, number, epoch=0)
            return
        except DamagedSampleError as error:
            reason, count = reason or f"{reader.name(shard, number)}: {error}", count + 1
    raise ConfigError(f"{key}: none of the first {count} samples can be read; {reason}")


def check_labels(index: ShardIndex, settings: ImageSettings, *, key: str) -> None:
    """Look at the labels of the first samples. Raises ConfigError, which blames `key`, when none of
    them has a label, and ShardError when one has a label that is no class."""
    reader = SampleReader(index, settings, seed=0)
    labels = []
    for shard, number in first_samples(index, NUM_PROBED):
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


def first_samples(index: ShardIndex, count: int) -> Iterator[tuple[int, int]]:
    """(shard, index) of the first `count` samples."""
    for shard, length in enumerate(index.lengths.tolist()):
        yield from ((shard, i) for i in range(min(length, count)))
        count -= min(length, count)


class NativeSet(NamedTuple):
    """A data set, as the config key `key` names it."""

    key: str
    shards: ShardIndex
    settings: ImageSettings


class Measured(NamedTuple):
    name: str
    size: Size


def check_native_sizes(sets: list[NativeSet], *, max_skipped_fraction: float) -> None:
    """Raises ConfigError where images must share the size of the first set's first one and do not,
    or where more than that part of them is too small."""
    first = Measured("the first one", sets[0].settings.size)
    for key, shards, settings in sets:
        if settings.resize or not (settings.needs or not settings.any_size):
            continue
        measured = sampled_sizes(shards, settings)
        if not settings.any_size:
            same = [image for image in measured if image.size == settings.size]
            if key == sets[0].key and same:
                first = same[0]
            for name, size in measured:
                if size != settings.size:
                    raise ConfigError(
                        f"data.resolution=native, {key}: {name} is {in_words(size)} pixels, but "
                        f"{first.name} is {in_words(first.size)}; {ways_to_one_size(first.size)}"
                    )
        small = [
            f"{name}: {problem}" for name, size in measured if (problem := settings.too_small(size))
        ]
        if len(small) > max_skipped_fraction * len(measured):
            raise ConfigError(
                f"data.resolution=native, {key}: {len(small)} of {len(measured)} images that were "
                f"looked at are too small ({'; '.join(small[:NUM_NAMED])}), more than "
                f"data.max_skipped_fraction={max_skipped_fraction:g}; leave them out of the data "
                "set, bring all to one size with data.resolution=N, or change that key"
            )


def sampled_sizes(index: ShardIndex, settings: ImageSettings) -> list[Measured]:
    """Of images that lie evenly over the data set, the first and the last among them.

    Left out is what cannot be decoded, or is read front to back (`pipe:`). Raises ShardError.
    """
    count = NUM_REMOTE if any(map(is_remote, index.paths)) else NUM_LOOKED_AT
    count = max(2, min(count, int(MAX_BYTES / max(1.0, index.mean_sample_bytes))))
    numbers = np.unique(np.linspace(0, index.num_samples - 1, count).astype(np.int64))
    ends = np.cumsum(index.lengths)
    shards = np.searchsorted(ends, numbers, "right")
    within = numbers - (ends - index.lengths)[shards]
    reader = SampleReader(index, settings, seed=0)

    def measure(place: tuple[int, int]) -> Measured | None:
        shard, number = place
        if is_pipe(index.paths[shard]):
            return None
        size = reader.size_or_none(reader.read(shard, number, number + 1)[0], shard, number)
        return None if size is None else Measured(reader.name(shard, number), size)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        places = zip(shards.tolist(), within.tolist(), strict=True)
        return [found for found in pool.map(measure, places) if found is not None]
