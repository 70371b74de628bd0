"""How samples become images, from the config and from what the first samples say, before training.

In: `data.*` and an index. Out: `ImageSettings`, or an error for what would stop the run later: no
first sample can be used, no image has a label, native images differ in size although they must
not, or too many are too small. What is not among those that are looked at, the reader finds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import DataConfig
from vae_dist.data.buckets import Size, make_buckets, square
from vae_dist.data.decode import note_of
from vae_dist.data.features import MEMBER, Features, in_text
from vae_dist.data.index import NUM_THREADS, ShardIndex
from vae_dist.data.reader import (
    LoadedSample,
    SampleReader,
    single_sample,
    ways_to_one_size,
)
from vae_dist.data.sources import is_pipe, is_remote, warn
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import NO_LABEL, ImageSettings, Need

NUM_PROBED = 100  # first samples that are tried
NUM_LOOKED_AT = 256  # finds a size that one image in a hundred has in 92 of 100 data sets
NUM_REMOTE = 32  # where each takes two requests
MAX_BYTES = 2**26  # of these images together
NUM_NAMED = 2


class DataSet(NamedTuple):
    """A data set, as the config key `key` names it."""

    key: str
    shards: ShardIndex
    settings: ImageSettings


def image_settings(
    index: ShardIndex,
    data: DataConfig,
    *,
    num_classes: int = 0,
    any_size: bool = False,
    needs: tuple[Need, ...] = (),
) -> ImageSettings:
    """Settings after `data.*`; the size of native images is that of the first readable one.

    any_size: native images may differ in size, and those below `needs` are not taken. Raises
    ConfigError when none of the first samples can be used.
    """
    names = {field.name for field in fields(ImageSettings)} & {f.name for f in fields(data)}
    keys: dict[str, Any] = {name: getattr(data, name) for name in names}
    common = ImageSettings(size=(0, 0), resize=True, num_classes=num_classes, **keys)
    resolution = data.resolution
    if isinstance(resolution, Mapping):
        buckets = make_buckets(**resolution)
        return replace(common, size=square(buckets), buckets=buckets)
    if resolution != "native":
        height, width = (resolution,) * 2 if isinstance(resolution, int) else tuple(resolution)
        return replace(common, size=(height, width))
    # labels and sizes that will not do are said of the data set, not of its first sample
    probe = replace(
        common, resize=False, any_size=True, num_classes=0, needs=needs if any_size else ()
    )
    image = _first_readable(index, probe, key="data.resolution=native").image
    size = (image.shape[1], image.shape[2])
    return replace(common, size=size, resize=False, any_size=any_size, needs=needs)


def with_features(
    index: ShardIndex, settings: ImageSettings, *, vision: str, key: str
) -> ImageSettings:
    """The settings that read the features of the model `vision`, if the first readable sample has
    any. Raises ConfigError where they would not be those of the images that are shown."""
    for shard, _, data in _first_samples(SampleReader(index, settings, seed=0)):
        with contextlib.suppress(DamagedSampleError):
            sample = single_sample(data, index.paths[shard])
            if MEMBER not in sample:
                return settings
            shape = Features.from_bytes(bytes(sample[MEMBER])).values.shape
            if settings.buckets or (settings.resize and settings.crop == "random"):
                choice = "aspect buckets" if settings.buckets else "data.crop=random"
                raise ConfigError(
                    f"{key}: the shards hold features of a vision model, of whole images or their "
                    f"centres, and {choice} shows other parts; set data.resolution and "
                    "data.crop=center, or give the shards without"
                )
            return replace(settings, vision=vision, features=shape)
    return settings


def check_data_sets(sets: Sequence[DataSet], *, max_skipped_fraction: float) -> None:
    """Look at some samples. Raises ConfigError, which blames the key of the set, where native
    images must share the size of the first set's first one and do not, where more than that part
    of them is too small, where none of the first samples can be read or has a label of a class
    that the model asks for; ShardError for a label that is no class."""
    _check_native_sizes(sets, max_skipped_fraction)
    for key, index, settings in sets:
        _first_readable(index, settings, key=key)
        _say_what_is_special(index, settings, key)
    for key, index, settings in sets:
        if settings.num_classes:
            _check_labels(index, settings, key)


def _first_readable(index: ShardIndex, settings: ImageSettings, *, key: str) -> LoadedSample:
    """Raises ConfigError with the reason of the first sample when none of the first ones can be
    read: that is not damage but the wrong kind of data."""
    reader, reason, count = SampleReader(index, settings, seed=0), "", 0
    for shard, number, data in _first_samples(reader):
        try:
            return reader.load(data, shard, number, epoch=0)
        except DamagedSampleError as error:
            reason, count = reason or f"{reader.name(shard, number)}: {error}", count + 1
    raise ConfigError(f"{key}: none of the first {count} samples can be read; {reason}")


def _say_what_is_special(index: ShardIndex, settings: ImageSettings, key: str) -> None:
    """One warning for each kind of note (`note_of`) on the first samples."""
    reader, noted = SampleReader(index, settings, seed=0), dict[str, list[str]]()
    for shard, number, data in _first_samples(reader):
        with contextlib.suppress(DamagedSampleError):
            note = note_of(single_sample(data, index.paths[shard]), settings.image_key)
            noted.setdefault(note, []).append(reader.name(shard, number))
    for note, names in noted.items():
        if note:
            more = f" (and so for {len(names) - 1} more)" if len(names) > 1 else ""
            warn(f"{key}: {names[0]}: {note}{more}")


def _check_labels(index: ShardIndex, settings: ImageSettings, key: str) -> None:
    reader = SampleReader(index, settings, seed=0)
    labels = []
    for shard, number, data in _first_samples(reader):
        with contextlib.suppress(DamagedSampleError):
            sample = single_sample(data, index.paths[shard])
            labels.append(reader.label(sample, shard, number))
    if labels and all(label == NO_LABEL for label in labels):
        raise ConfigError(
            f"model.num_classes={settings.num_classes}, but none of the first {len(labels)} images "
            f"of {key} has a label under data.label_key={settings.label_key}; name the field that "
            "holds it, or set model.num_classes=0"
        )


def _first_samples(reader: SampleReader) -> Iterator[tuple[int, int, memoryview]]:
    """(shard, index, bytes) of the first NUM_PROBED samples, of fewer large ones."""
    few = max(1, int(MAX_BYTES / max(1.0, reader.index.mean_sample_bytes)))
    count = min(NUM_PROBED, few, reader.index.num_samples)
    for run in reader.in_order(0, count):
        for number, data in enumerate(reader.read(*run), run.start):
            yield run.shard, number, data


def _check_native_sizes(sets: Sequence[DataSet], max_skipped_fraction: float) -> None:
    first = ("the first one", sets[0].settings.size)
    for key, index, settings in sets:
        if settings.resize or not (settings.needs or not settings.any_size):
            continue
        measured = sampled_sizes(index, settings)
        if not settings.any_size:
            if key == sets[0].key:
                first = next((image for image in measured if image[1] == settings.size), first)
            for name, size in measured:
                if size != settings.size:
                    raise ConfigError(
                        f"data.resolution=native, {key}: {name} is {in_text(size)} pixels, but "
                        f"{first[0]} is {in_text(first[1])}; {ways_to_one_size(first[1])}"
                    )
        small = [f"{name}: {problem}" for name, s in measured if (problem := settings.too_small(s))]
        if len(small) > max_skipped_fraction * len(measured):
            raise ConfigError(
                f"data.resolution=native, {key}: {len(small)} of {len(measured)} images that were "
                f"looked at are too small ({'; '.join(small[:NUM_NAMED])}), more than "
                f"data.max_skipped_fraction={max_skipped_fraction:g}; leave them out of the data "
                "set, bring all to one size with data.resolution=N, or change that key"
            )


def sampled_sizes(index: ShardIndex, settings: ImageSettings) -> list[tuple[str, Size]]:
    """Names and sizes of images that lie evenly over the data set, the first and the last among
    them.

    Left out is what cannot be decoded, or is read front to back (`pipe:`). Raises ShardError.
    """
    count = NUM_REMOTE if any(map(is_remote, index.paths)) else NUM_LOOKED_AT
    count = max(2, min(count, int(MAX_BYTES / max(1.0, index.mean_sample_bytes))))
    numbers = np.unique(np.linspace(0, index.num_samples - 1, count).astype(np.int64)).tolist()
    reader = SampleReader(index, settings, seed=0)

    def measure(number: int) -> tuple[str, Size] | None:
        ((shard, start, stop),) = reader.in_order(number, number + 1)
        if is_pipe(index.paths[shard]):
            return None
        size = reader.size_or_none(reader.read(shard, start, stop)[0], shard, start)
        return None if size is None else (reader.name(shard, start), size)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [found for found in pool.map(measure, numbers) if found is not None]
