"""How samples become images, from the config and from what samples say, before training.

In: `data.*` and an index. Out: `ImageSettings`, or an error for what would stop the run later: no
sample can be used, none has a label, native images differ in size although they must not, or too
many are too small. What is not among those that are looked at, the reader finds; `verify` reads all
and gives the `Findings` in each shard.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import DataConfig
from vae_dist.data.buckets import Size, make_buckets, nearest
from vae_dist.data.decode import MASK_MEMBER, decode_mask, decode_own, image_of, note_of
from vae_dist.data.features import MEMBER, Features, in_text
from vae_dist.data.index import Run, ShardIndex
from vae_dist.data.reader import LoadedSample, SampleReader, single_sample, ways_to_one_size
from vae_dist.data.sources import is_pipe, is_remote, warn
from vae_dist.data.tar import DamagedSampleError, ShardError
from vae_dist.data.transforms import NO_LABEL, ImageSettings, Need

NUM_PROBED, NUM_REMOTE = 100, 32  # samples that are looked at
MAX_BYTES = 2**26  # of these together
NUM_NAMED = 2
NUM_THREADS = 4  # of `verify`; decoders release the interpreter
READ_TOGETHER = 32  # samples


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
    ConfigError when none of the samples can be used.
    """
    names = {field.name for field in fields(ImageSettings)} & {f.name for f in fields(data)}
    keys: dict[str, Any] = {name: getattr(data, name) for name in names}
    common = ImageSettings(size=(0, 0), resize=True, num_classes=num_classes, **keys)
    resolution = data.resolution
    if isinstance(resolution, Mapping):
        buckets = make_buckets(**resolution)
        return replace(common, size=nearest(buckets, 0.0), buckets=buckets)
    if resolution != "native":
        height, width = (resolution,) * 2 if isinstance(resolution, int) else tuple(resolution)
        return replace(common, size=(height, width))
    # labels and sizes that will not do are said of the data set, not of its first sample
    probe = replace(
        common, resize=False, any_size=True, num_classes=0, needs=needs if any_size else ()
    )
    image = _first_readable(_Probe(index, probe), key="data.resolution=native").image
    size = (image.shape[1], image.shape[2])
    return replace(common, size=size, resize=False, any_size=any_size, needs=needs)


def with_features(index: ShardIndex, settings: ImageSettings, *, vision: str) -> ImageSettings:
    """The settings that read the features of the model `vision`, if the first readable sample has
    any. Raises ConfigError where they would not be those of the images that are shown."""
    for _, sample in _Probe(index, settings).parsed():
        if MEMBER not in sample:
            return settings
        with contextlib.suppress(DamagedSampleError):
            shape = Features.from_bytes(sample[MEMBER]).values.shape
            if settings.buckets or settings.draws_crop:
                choice = "aspect buckets" if settings.buckets else "data.crop=random"
                raise ConfigError(
                    f"data.train: the stored features are of whole images or centres, and {choice} "
                    "shows other parts; set data.crop=center, or give the shards without"
                )
            return replace(settings, vision=vision, features=shape)
    return settings


def check_data_sets(sets: Sequence[DataSet], *, max_skipped_fraction: float) -> None:
    """Look at some samples. Raises ConfigError, which blames the key of the set, where native
    images must share the size of the first set's first one and do not, where more than that part
    of them is too small, where none of the samples can be read or has a label of a class that the
    model asks for; ShardError for a label that is no class."""
    for key, index, settings in sets:
        probe = _Probe(index, settings)
        if not settings.resize:
            _check_native_sizes(probe, sets[0].settings.size, key, max_skipped_fraction)
        _first_readable(probe, key=key)
        noted: dict[str, list[str]] = {}
        labels = []
        for run, sample in probe.parsed():
            with contextlib.suppress(DamagedSampleError):
                name = probe.reader.name(run.shard, run.start)
                noted.setdefault(note_of(sample, settings.image_key), []).append(name)
                labels.append(probe.reader.label(sample, run.shard, run.start))
        for note, names in noted.items():
            if note:
                more = f" (and so for {len(names) - 1} more)" if len(names) > 1 else ""
                warn(f"{key}: {names[0]}: {note}{more}")
        if settings.num_classes and labels and all(label == NO_LABEL for label in labels):
            raise ConfigError(
                f"model.num_classes={settings.num_classes}, but none of {len(labels)} images of "
                f"{key} has a label; correct data.label_key={settings.label_key}, or set that to 0"
            )


class _Probe:
    """Samples that lie evenly over a data set, undecoded; of pipes the first ones."""

    def __init__(self, index: ShardIndex, settings: ImageSettings) -> None:
        self.reader = SampleReader(index, settings, seed=0)
        count = NUM_REMOTE if any(map(is_remote, index.paths)) else NUM_PROBED
        count = min(count, index.num_samples, int(MAX_BYTES / max(1.0, index.mean_sample_bytes)))
        numbers = np.arange(max(1, count))
        if not any(map(is_pipe, index.paths)):
            numbers = np.linspace(0, index.num_samples - 1, len(numbers)).astype(np.int64)
        self.runs = [run for n in numbers.tolist() for run in self.reader.in_order(n, n + 1)]
        self.samples = self.reader.read(self.runs)

    def parsed(self) -> list[tuple[Run, dict[str, Any]]]:
        """The members of each sample whose tar headers are whole."""
        found = []
        for run, data in zip(self.runs, self.samples, strict=True):
            with contextlib.suppress(DamagedSampleError):
                found.append((run, single_sample(data, self.reader.index.paths[run.shard])))
        return found


def _first_readable(probe: _Probe, *, key: str) -> LoadedSample:
    """Raises ConfigError with the reason of the first sample when none can be read: that is not
    damage but the wrong kind of data."""
    reader, reason = probe.reader, ""
    for run, data in zip(probe.runs, probe.samples, strict=True):
        try:
            return reader.load(data, run.shard, run.start, epoch=0)
        except DamagedSampleError as error:
            reason = reason or f"{reader.name(run.shard, run.start)}: {error}"
    raise ConfigError(f"{key}: none of {len(probe.runs)} samples can be read; {reason}")


def _check_native_sizes(probe: _Probe, wanted: Size, key: str, max_skipped_fraction: float) -> None:
    reader, settings, small, measured = probe.reader, probe.reader.settings, [], 0
    for run, data in zip(probe.runs, probe.samples, strict=True):
        size = reader.size_or_none(data, run.shard)
        if size is None:
            continue
        measured, name = measured + 1, reader.name(run.shard, run.start)
        if not settings.any_size and size != wanted:
            raise ConfigError(
                f"data.resolution=native, {key}: {name} is {in_text(size)} pixels, but the first "
                f"image is {in_text(wanted)}; {ways_to_one_size(wanted)}"
            )
        if problem := settings.too_small(size):
            small.append(f"{name}: {problem}")
    if len(small) > max_skipped_fraction * measured:
        raise ConfigError(
            f"data.resolution=native, {key}: {len(small)} of {measured} images are too small "
            f"({'; '.join(small[:NUM_NAMED])}), more than data.max_skipped_fraction="
            f"{max_skipped_fraction:g}; set data.resolution=N, or raise that"
        )


# every sample


@dataclass
class Findings:
    """What is in a shard: sizes (H, W) and numbers of channels of the readable samples."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    masks: Counter[str] = field(default_factory=Counter)  # samples by the data.mask they ask for
    problems: list[str] = field(default_factory=list)  # of damaged samples, and of the shard
    keys: list[str] = field(default_factory=list)
    double: list[str] = field(default_factory=list)  # keys that an earlier sample has too


def verify(index: ShardIndex, settings: ImageSettings) -> Iterator[Findings]:
    """What is found in each shard, in order."""
    reader = SampleReader(index, settings, seed=0)
    seen: set[int] = set()  # hashes of keys
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for found in pool.map(lambda s: _findings(reader, s), range(len(index.paths))):
            for key in found.keys:
                if hash(key) in seen:
                    found.double.append(key)
                seen.add(hash(key))
            yield found


def _findings(reader: SampleReader, shard: int) -> Findings:
    found, settings = Findings(), reader.settings
    path, length = reader.index.paths[shard], int(reader.index.lengths[shard])
    try:
        for start in range(0, length, READ_TOGETHER):
            run = Run(shard, start, min(length, start + READ_TOGETHER))
            for number, data in enumerate(reader.read([run]), start):
                try:
                    sample = single_sample(data, path)
                    found.keys.append(str(sample["__key__"]))
                    suffix, image = image_of(sample, settings.image_key)
                    pixels = decode_own(suffix, image, max_pixels=settings.max_pixels)
                    size = pixels.shape[1], pixels.shape[2]
                    decode_mask(sample, size, max_pixels=settings.max_pixels)
                    if MEMBER in sample:
                        Features.from_bytes(sample[MEMBER])
                except DamagedSampleError as error:
                    found.problems.append(f"{path} sample {number}: {error}")
                    continue
                found.masks["nan"] += bool(np.isnan(pixels).any())
                found.masks["member"] += MASK_MEMBER in sample
                found.channels[len(pixels)] += 1
                found.sizes[size] += 1
    except ShardError as error:
        found.problems.append(str(error))
    return found
