"""The batches of a run, for one rank: step by step, from any step on, with any number of workers.

In: the index of the shards, their order, how to make images of them.
Out: `Batch`: this rank's images of a step in groups of one shape, each in slot order.

Step k takes the next sample of each of the order's sequences. A rank owns neighbouring ones,
batch_size / world of them, and its loader workers share these. With aspect buckets a slot owns one
sequence, and step k takes its next batch_size / slots samples, which share a size
(`vae_dist.data.windows`). So who reads what depends on the machine, but what step k shows does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from vae_dist.data.features import TYPE
from vae_dist.data.index import ShardIndex
from vae_dist.data.order import MixedOrder, Order
from vae_dist.data.reader import LoadedSample, SampleReader, SkippedSample
from vae_dist.data.sources import START_RETRY_S
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.windows import ReadAhead, WindowReader
from vae_dist.data.workers import BatchMemory, WorkerPool

Shape = tuple[int, ...]


class Group(NamedTuple):
    """Slots of a step whose images share a shape, in ascending order."""

    slots: tuple[int, ...]  # numbers among all slots of the step; each has b / len(slots) images
    images: torch.Tensor  # (b, C, H, W) as stored, in memory as (b, H, W, C)
    labels: torch.Tensor  # int64 (b,), -1 where there is none
    masks: torch.Tensor | None = None  # uint8 (b, 1, H, W), 1: observed; None: all are
    features: torch.Tensor | None = None  # float16 (b, W, h, w) of a vision model, where stored

    def part(self, start: int, stop: int) -> Group:
        """The slots at places start, ..., stop - 1 of this group."""
        per_slot = len(self.images) // len(self.slots)
        part = slice(start * per_slot, stop * per_slot)
        more = [None if tensor is None else tensor[part] for tensor in self[3:]]
        return Group(self.slots[start:stop], self.images[part], self.labels[part], *more)


class Batch(NamedTuple):
    """One rank's part of a step."""

    step: int
    groups: tuple[Group, ...]  # by their first slot; shapes differ
    shards: tuple[str, ...]  # that these images came from
    skipped: tuple[SkippedSample, ...]

    @property
    def num_images(self) -> int:
        return sum(len(group.images) for group in self.groups)


class TrainingStream:
    """Iterates over the batches start_step, ..., stop_step - 1 of one rank.

    slots: of a step over all ranks (0: one for each image). The order has batch_size
    sequences, with slot_rows as many as slots. `workers` loader processes (0: this process) decode.
    Iterating raises ShardError when the data cannot be used; close() ends the workers.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: Order | MixedOrder,
        settings: ImageSettings,
        *,
        batch_size: int,
        start_step: int,
        stop_step: int,
        slots: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        cache_bytes: int = 0,
        retry_s: float = START_RETRY_S,
    ) -> None:
        assert order.lanes * max(1, order.slot_rows) == batch_size, (order.lanes, batch_size)
        assert order.lanes % world == 0, (order.lanes, world)
        assert bool(order.slot_rows) == bool(settings.buckets), order.slot_rows
        share = order.lanes // world
        slots = (slots or batch_size) // world
        assert share % slots == 0, (share, slots)
        # with images of any size, those of a slot could not go through together
        assert not settings.any_size or share == slots, (share, slots)
        self._share, self._per_slot = share, share // slots  # sequences
        self._first_slot = rank * slots
        self._paths, self._pin_memory = index.paths, pin_memory
        self._settings, self._steps = settings, range(start_step, stop_step)
        workers = min(workers, share)
        own_cache = cache_bytes // max(1, workers)
        reader = SampleReader(
            index, settings, seed=order.seed, cache_bytes=own_cache, retry_s=retry_s
        )
        self._memory: BatchMemory | None = None
        if not settings.sizes_differ:
            self._memory = BatchMemory(
                ((share, *settings.size, settings.planes), settings.dtype),
                ((share,), np.int64),
                ((share, *settings.features), TYPE),
                is_shared=workers > 0,
            )
        sequences = range(rank * share, (rank + 1) * share)
        make_parts = _TrainingParts(reader, order, sequences, self._steps, self._memory)
        self._pool = WorkerPool(make_parts, num_workers=workers)
        self.close = weakref.finalize(self, self._pool.close)

    def __iter__(self) -> Iterator[Batch]:
        parts = iter(self._pool)
        for step in self._steps:
            of_step: list[_Part] = [next(parts) for _ in range(max(1, self._pool.num_workers))]
            assert all(part.step == step for part in of_step), [part.step for part in of_step]
            by_shape: dict[Shape, dict[int, list[LoadedSample]]] = {}
            for part in of_step:
                for shape, sequences in part.loaded.items():
                    by_shape.setdefault(shape, {}).update(sequences)
            groups = sorted(map(self._stacked, by_shape.values()), key=lambda group: group.slots)
            if self._memory is not None:
                groups = [self._group(range(self._share), *self._memory[step])]
            shards = sorted({self._paths[shard] for part in of_step for shard in part.shards})
            skipped = [sample for part in of_step for sample in part.skipped]
            yield Batch(step, tuple(groups), tuple(shards), tuple(skipped))

    def _stacked(self, by_sequence: dict[int, list[LoadedSample]]) -> Group:
        """The workers' images of one shape, sequence by sequence."""
        numbers = sorted(by_sequence)
        samples = [sample for number in numbers for sample in by_sequence[number]]
        images = np.stack([sample.image.transpose(1, 2, 0) for sample in samples])
        labels = np.array([sample.label for sample in samples])
        return self._group(numbers, images, labels, np.stack([s.features for s in samples]))

    def _group(
        self,
        numbers: range | list[int],
        images: np.ndarray,
        labels: np.ndarray,
        features: np.ndarray,
    ) -> Group:
        """numbers: of the sequences, among the rank's. images: (b, H, W, planes)."""
        pixels = self._own(images)
        slots = dict.fromkeys(self._first_slot + n // self._per_slot for n in numbers)
        has_mask, vision = self._settings.has_mask, self._settings.vision
        planes, masks = split_mask(pixels.permute(0, 3, 1, 2), has_mask=has_mask)
        found = self._own(features) if vision else None
        return Group(tuple(slots), planes, torch.from_numpy(labels.copy()), masks, found)

    def _own(self, array: np.ndarray) -> torch.Tensor:
        """Not of memory that workers share."""
        tensor = torch.from_numpy(array)
        if self._pin_memory:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        is_shared = self._memory is not None and self._memory.is_shared
        return tensor.clone() if is_shared else tensor


class _Part(NamedTuple):
    """One worker's part of a rank's step; images of one size lie in the memory of the batch."""

    step: int
    loaded: dict[Shape, dict[int, list[LoadedSample]]]  # by shape and sequence, where sizes differ
    shards: set[int]
    skipped: list[SkippedSample]


class _TrainingParts:
    """What one worker does: its sequences' part of each step."""

    def __init__(
        self,
        reader: SampleReader,
        order: Order | MixedOrder,
        sequences: range,
        steps: range,
        memory: BatchMemory | None,
    ) -> None:
        self.reader, self.order, self.sequences = reader, order, sequences
        self.steps, self.memory = steps, memory

    def __call__(self, worker: int, num_workers: int) -> Iterator[_Part]:
        rows = max(1, self.order.slot_rows)
        read_ahead = ReadAhead(self.reader)
        mine = {
            number: WindowReader(
                self.reader, self.order, sequence, self.steps.start * rows, read_ahead
            )
            for number, sequence in enumerate(self.sequences)
            if number % num_workers == worker
        }
        try:
            for step in self.steps:
                part = _Part(step, {}, set(), [])
                if self.memory is None:
                    self._of_any_size(mine, rows, part)
                else:
                    arrays = [array[worker::num_workers] for array in self.memory[step]]
                    self._of_one_size(list(mine.values()), arrays, part)
                yield part
        finally:
            read_ahead.close()

    def _of_one_size(
        self, readers: list[WindowReader], arrays: list[np.ndarray], part: _Part
    ) -> None:
        """A sample of each into images (b, H, W, C), labels and features.

        All samples are prepared before the first one is decoded: the interpreter is several times
        slower just after a decoder has filled the caches with its own.
        """
        places = [(reader, reader.advance(1).start) for reader in readers]
        numbers = np.array([reader.numbers[place] for reader, place in places])
        part.shards.update(self.reader.shards_of(numbers))
        if self.reader.take_cached(numbers, out=arrays):
            return
        images, labels, features = arrays
        outs = list(images.transpose(0, 3, 1, 2))  # (C, H, W) each
        prepared = [
            reader.prepare(place, out=out)
            for (reader, place), out in zip(places, outs, strict=True)
        ]
        for i, (reader, place) in enumerate(places):
            image, labels[i], features[i] = reader.load(place, prepared[i], part.skipped)
            if image is not outs[i]:
                outs[i][:] = image

    def _of_any_size(self, readers: dict[int, WindowReader], rows: int, part: _Part) -> None:
        """`rows` samples of each; the images of a sequence share a shape."""
        for number, reader in readers.items():
            places = reader.advance(rows)
            numbers = np.array([reader.numbers[place] for place in places])
            part.shards.update(self.reader.shards_of(numbers))
            loaded = [reader.load(p, reader.prepare(p), part.skipped) for p in places]
            size = loaded[0].image.shape
            assert all(sample.image.shape == size for sample in loaded), size
            shape = (*size, *loaded[0].features.shape)
            part.loaded.setdefault(shape, {})[number] = loaded


def split_mask(planes: torch.Tensor, *, has_mask: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images and masks of what a reader yields: the mask is its last plane."""
    if not has_mask:
        return planes, None
    return planes[:, :-1], planes[:, -1:].to(torch.uint8)
