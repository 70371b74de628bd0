"""The batches of a run and of an evaluation, for one rank, with any number of loader processes.

In: the index of the shards, how to make images of them, for a run their order.
Out: `Batch`: this rank's images of a step in groups of one shape, each in slot order; or
`EvaluationBatch`: each image of a data set once over all ranks, in index order, nothing drawn.

Step k takes the next sample of each of the order's sequences. A rank owns neighbouring ones,
batch_size / world of them, and its loader workers share these. With aspect buckets a slot owns one
sequence, and step k takes its next batch_size / slots samples, which share a size
(`vae_dist.data.windows`). So who reads what depends on the machine, but what step k shows does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vae_dist.data.index import Run, ShardIndex
from vae_dist.data.order import MixedOrder, Order
from vae_dist.data.reader import LoadedSample, SampleReader, SkippedSample
from vae_dist.data.sources import START_RETRY_S
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.windows import ReadAhead, WindowReader
from vae_dist.data.workers import WorkerPool, shared_arrays

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
        self._per_slot, self._first_slot = share // slots, rank * slots
        self._paths, self._settings, self._pin_memory = index.paths, settings, pin_memory
        self._steps = range(start_step, stop_step)
        workers = min(workers, share)
        own_cache = cache_bytes // max(1, workers)
        reader = SampleReader(
            index, settings, seed=order.seed, cache_bytes=own_cache, retry_s=retry_s
        )
        self._shared: list[np.ndarray] = []  # images of a step, where workers make them
        if workers and not settings.sizes_differ:
            shape = (share, *settings.size, settings.planes)
            self._shared = shared_arrays(shape, np.dtype(settings.dtype))
        sequences = range(rank * share, (rank + 1) * share)
        make_parts = _TrainingParts(reader, order, sequences, self._steps, self._shared)
        self._pool = WorkerPool(make_parts, num_workers=workers)
        self.close = weakref.finalize(self, self._pool.close)

    def __iter__(self) -> Iterator[Batch]:
        parts = iter(self._pool)
        for step in self._steps:
            of_step: list[_Part] = [next(parts) for _ in range(max(1, self._pool.num_workers))]
            assert all(part.step == step for part in of_step), [part.step for part in of_step]
            by_shape: dict[Shape, list[_Stack]] = {}
            for stack in (stack for part in of_step for stack in part.stacks):
                by_shape.setdefault(stack.shape, []).append(stack)
            groups = [self._group(stacks, step) for stacks in by_shape.values()]
            groups.sort(key=lambda group: group.slots)
            shards = sorted({self._paths[shard] for part in of_step for shard in part.shards})
            skipped = [sample for part in of_step for sample in part.skipped]
            yield Batch(step, tuple(groups), tuple(shards), tuple(skipped))

    def _group(self, stacks: list[_Stack], step: int) -> Group:
        """The workers' images of one shape, sequence by sequence."""
        numbers, images, *more = stacks[0]
        if len(stacks) > 1:
            numbers, images, *more = map(np.concatenate, zip(*stacks, strict=True))
            order = np.argsort(numbers, kind="stable")
            numbers, *more = (array[order] for array in (numbers, *more))
            images = images if self._shared else images[order]
        if self._shared:
            images = self._shared[step % len(self._shared)]
        pixels, labels, features = map(torch.from_numpy, (images, *more))
        if self._pin_memory:
            pixels, features = pixels.pin_memory(), features.pin_memory()
        elif self._shared:
            pixels = pixels.clone()
        planes = pixels.permute(0, 3, 1, 2)
        shown, masks = split_mask(planes, has_mask=self._settings.has_mask)
        slots = dict.fromkeys((self._first_slot + numbers // self._per_slot).tolist())
        vision = features if self._settings.vision else None
        return Group(tuple(slots), shown, labels, masks, vision)


class _Stack(NamedTuple):
    """Images of one shape."""

    numbers: np.ndarray  # of their sequences, ascending
    images: np.ndarray  # (b, H, W, planes); (0, H, W, planes) where they lie in shared memory
    labels: np.ndarray
    features: np.ndarray

    @property
    def shape(self) -> Shape:
        return (*self.images.shape[1:], *self.features.shape[1:])


class _Part(NamedTuple):
    """One worker's part of a rank's step."""

    step: int
    stacks: list[_Stack]
    shards: set[int]
    skipped: list[SkippedSample]


@dataclass
class _TrainingParts:
    """What one worker does: its sequences' part of each step."""

    reader: SampleReader
    order: Order | MixedOrder
    sequences: range
    steps: range
    shared: list[np.ndarray]

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
                by_shape: dict[Shape, list[tuple[int, LoadedSample]]] = {}
                skipped: list[SkippedSample] = []
                shards: set[int] = set()
                images = self._images(step, len(mine), worker, num_workers)
                for place, (number, reader) in enumerate(mine.items()):
                    for _ in range(rows):
                        shard, sample = reader.next(skipped)
                        shards.add(shard)
                        shape = (*sample.image.shape, *sample.features.shape)
                        if images is not None:  # at once: the next one is decoded to the same place
                            images[place] = sample.image.transpose(1, 2, 0)
                            sample = sample._replace(image=images[:0])
                        by_shape.setdefault(shape, []).append((number, sample))
                rest = images[:0] if images is not None and self.shared else images
                stacks = [_stacked(found, rest) for found in by_shape.values()]
                yield _Part(step, stacks, shards, skipped)
        finally:
            read_ahead.close()

    def _images(self, step: int, num: int, worker: int, num_workers: int) -> np.ndarray | None:
        """Memory for a worker's images of a step, where they share a size: laid out as most
        decoders do, for convolutions sum another layout in another order."""
        settings = self.reader.settings
        if self.shared:
            return self.shared[step % len(self.shared)][worker::num_workers]
        if settings.sizes_differ:
            return None
        return np.empty((num, *settings.size, settings.planes), settings.dtype)


def _stacked(found: list[tuple[int, LoadedSample]], pixels: np.ndarray | None) -> _Stack:
    """pixels: the images (b, H, W, planes), where they are together already."""
    numbers, samples = zip(*found, strict=True)
    images, labels, features = zip(*samples, strict=True)
    if pixels is None:
        pixels = np.stack([np.ascontiguousarray(image.transpose(1, 2, 0)) for image in images])
    return _Stack(np.array(numbers), pixels, np.array(labels), np.stack(features))


def split_mask(planes: torch.Tensor, *, has_mask: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images and masks of what a reader yields: the mask is its last plane."""
    if not has_mask:
        return planes, None
    return planes[:, :-1], planes[:, -1:].to(torch.uint8)


class EvaluationBatch(NamedTuple):
    """One rank's images of one shape; what pads them has weight 0 and sample -1.

    is_first: every rank has as many of these, in the same order of the data, so all ranks may
    agree on something there; a rank has others only where its images differ in shape.
    """

    images: torch.Tensor  # (b, C, H, W) as stored
    labels: torch.Tensor  # int64 (b,), -1 where there is none
    samples: torch.Tensor  # int64 (b,), number in index order
    weights: torch.Tensor  # float32 (b,), 1 for an image, 0 for padding and unreadable samples
    skipped: tuple[SkippedSample, ...]
    masks: torch.Tensor | None = None  # uint8 (b, 1, H, W), 1: observed; None: all are
    is_first: bool = True

    def counted(self) -> EvaluationBatch:
        """The images that count, without padding."""
        counts = self.weights > 0
        images, labels, samples, weights = (tensor[counts] for tensor in self[:4])
        masks = None if self.masks is None else self.masks[counts]
        skipped, is_first = self.skipped, self.is_first
        return EvaluationBatch(images, labels, samples, weights, skipped, masks, is_first)


class EvaluationStream:
    """Each image once over all ranks, in index order; iterate as often as wanted.

    Every rank yields the same number of batches, of equal sizes over the ranks: batch_size images
    each, fewer in the last one. Where images differ in shape each of these becomes several, one for
    each shape, the first of them marked. max_images: only the first so many.
    """

    def __init__(
        self,
        index: ShardIndex,
        settings: ImageSettings,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        max_images: int | None = None,
        retry_s: float = START_RETRY_S,
    ) -> None:
        self.num_images = min(index.num_samples, max_images or index.num_samples)
        self._num_batches = -(-self.num_images // (batch_size * world))
        self._has_mask = settings.has_mask
        reader = SampleReader(index, settings.without_augmentation(), seed=0, retry_s=retry_s)
        make_parts = _EvaluationParts(reader, self.num_images, batch_size, rank, world)
        self._pool = WorkerPool(make_parts, num_workers=min(workers, self._num_batches))
        self.close = weakref.finalize(self, self._pool.close)

    def __len__(self) -> int:
        """Batches that are marked as first."""
        return self._num_batches

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for parts in self._pool:
            for number, (arrays, skipped) in enumerate(parts):
                planes, labels, samples, weights = map(torch.from_numpy, arrays)
                images, masks = split_mask(planes, has_mask=self._has_mask)
                is_first = number == 0
                yield EvaluationBatch(images, labels, samples, weights, skipped, masks, is_first)


# (b, planes, H, W) of one shape, labels, samples, weights; and what was skipped
_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_EvaluationPart = tuple[_Arrays, tuple[SkippedSample, ...]]


@dataclass
class _EvaluationParts:
    """What one worker does: every num_workers-th batch of its rank."""

    reader: SampleReader
    num_images: int
    batch_size: int
    rank: int
    world: int

    def __call__(self, worker: int, num_workers: int) -> Iterator[list[_EvaluationPart]]:
        of_all, batches = self.batch_size * self.world, []
        for low in range(worker * of_all, self.num_images, num_workers * of_all):
            in_step = min(of_all, self.num_images - low)
            size = -(-in_step // self.world)  # the last batch is cut evenly, then padded
            first = low + self.rank * size
            runs = self.reader.in_order(first, min(first + size, low + in_step))
            batches.append((runs, first, size))
        read_ahead = ReadAhead(self.reader)
        requests = (read_ahead.request(runs) for runs, _, _ in batches)
        try:
            following = next(requests, None)
            for runs, first, size in batches:
                awaited, following = following, next(requests, None)
                assert awaited is not None
                yield self._parts(runs, awaited.result(), first, size)
        finally:
            read_ahead.close()

    def _parts(
        self, runs: list[Run], data: list[memoryview], first: int, size: int
    ) -> list[_EvaluationPart]:
        """One part for each shape, at least one; the first names what is skipped."""
        settings = self.reader.settings
        found: dict[Shape, list[tuple[int, LoadedSample]]] = {}
        skipped: list[SkippedSample] = []
        places = [(shard, index) for shard, start, stop in runs for index in range(start, stop)]
        for number, ((shard, index), sample) in enumerate(zip(places, data, strict=True), first):
            try:
                loaded = self.reader.load(sample, shard, index, epoch=0)
                found.setdefault(loaded.image.shape, []).append((number, loaded))
            except DamagedSampleError as error:
                path = self.reader.index.paths[shard]
                skipped.append(SkippedSample(path, index, str(error), None))
        if not settings.sizes_differ or not found:
            shape = (settings.planes, *settings.size)
            return [(self._arrays(found.get(shape, []), shape, size), tuple(skipped))]
        parts = [self._arrays(images, shape, len(images)) for shape, images in found.items()]
        return [(part, () if number else tuple(skipped)) for number, part in enumerate(parts)]

    def _arrays(self, found: list[tuple[int, LoadedSample]], shape: Shape, size: int) -> _Arrays:
        images = np.zeros((size, *shape), self.reader.settings.dtype)
        labels, samples = np.full((2, size), -1, np.int64)
        weights = np.zeros(size, np.float32)
        for i, (number, loaded) in enumerate(found):
            images[i], samples[i], labels[i], weights[i] = loaded.image, number, loaded.label, 1
        return images, labels, samples, weights
