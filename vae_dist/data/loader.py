"""The batches of a run, for one rank: step by step, from any step on, with any number of workers.

In: the index of the shards, their order, how to make images of them.
Out: `Batch`: this rank's images of a step in groups of one shape, each in slot order.

Step k takes row k of every lane; a rank owns batch_size / world neighbouring lanes, and its loader
workers share them. With aspect buckets a slot owns one lane, and step k takes the next
batch_size / slots rows of it, which share a size (`vae_dist.data.windows`). So who reads what
depends on the machine, but what step k shows does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from vae_dist.data.index import ShardIndex
from vae_dist.data.order import MixedOrder, Order
from vae_dist.data.reader import SampleReader, SkippedSample
from vae_dist.data.ring import can_share, empty_pixels
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.work import Block, Shape, Share, TrainingWork
from vae_dist.data.workers import WorkerPool


class Group(NamedTuple):
    """Slots of a step whose images share a shape, in ascending order."""

    slots: tuple[int, ...]  # numbers among all slots of the step; each has b / len(slots) images
    images: torch.Tensor  # (b, C, H, W) as stored, in memory as (b, H, W, C)
    labels: torch.Tensor  # int64 (b,), -1 where there is none
    masks: torch.Tensor | None = None  # uint8 (b, 1, H, W), 1: observed; None: all are

    def part(self, start: int, stop: int) -> Group:
        """The slots at places start, ..., stop - 1 of this group."""
        per_slot = len(self.images) // len(self.slots)
        part = slice(start * per_slot, stop * per_slot)
        masks = None if self.masks is None else self.masks[part]
        return Group(self.slots[start:stop], self.images[part], self.labels[part], masks)


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

    slots: of a step over all ranks (0: one for each image). The order must have batch_size lanes,
    or with slot_rows as many as slots. `workers` loader processes (0: this process) decode.
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
        keep_bytes: int = 0,
    ) -> None:
        assert order.lanes * max(1, order.slot_rows) == batch_size, (order.lanes, batch_size)
        assert order.lanes % world == 0, (order.lanes, world)
        assert bool(order.slot_rows) == bool(settings.buckets), order.slot_rows
        share = order.lanes // world
        lanes = range(rank * share, (rank + 1) * share)
        slots = (slots or batch_size) // world
        assert share % slots == 0, (share, slots)
        # with images of any size, those of a slot could not go through together
        assert not settings.any_size or share == slots, (share, slots)
        self._lanes_per_slot = share // slots
        self._first_slot = rank * slots
        self._paths, self._pin_memory = index.paths, pin_memory
        self._has_mask = settings.has_mask
        workers = min(workers, share)
        reader = SampleReader(
            index, settings, seed=order.seed, keep_bytes=keep_bytes // max(1, workers)
        )
        self._steps = range(start_step, stop_step)
        work = TrainingWork(reader, order, lanes, self._steps)
        self._work = work
        self._pool = WorkerPool(work, num_workers=workers)
        self.close = weakref.finalize(self, _close, work, self._pool)

    def __iter__(self) -> Iterator[Batch]:
        num_workers = self._pool.num_workers
        ring = self._work.make_ring(num_workers) if num_workers and can_share() else None
        shares = iter(self._pool)
        try:
            for _ in self._steps:
                if ring is not None:
                    ring.take_back()
                yield self._merge([next(shares) for _ in range(max(1, num_workers))])
        finally:
            if ring is not None:
                ring.close()

    def _merge(self, parts: list[Share]) -> Batch:
        assert all(part.step == parts[0].step for part in parts), [part.step for part in parts]
        blocks: dict[torch.Size | None, list[Block]] = {}
        for part in parts:
            for block in part.blocks:
                shape = None if block.pixels is None else block.pixels.shape[1:]
                blocks.setdefault(shape, []).append(block)
        groups = sorted((self._group(same) for same in blocks.values()), key=lambda g: g.slots)
        shards = sorted({self._paths[shard] for part in parts for shard in part.shards})
        skipped = [sample for part in parts for sample in part.skipped]
        return Batch(parts[0].step, tuple(groups), tuple(shards), tuple(skipped))

    def _group(self, blocks: list[Block]) -> Group:
        """The workers' images of one shape, lane by lane."""
        lanes, labels = blocks[0].lanes, blocks[0].labels
        if len(blocks) > 1:
            lanes = sorted(lane for block in blocks for lane in block.lanes)
            by_lane = np.empty((len(lanes), len(labels) // len(blocks[0].lanes)), np.int64)
            for block in blocks:
                mine = block.labels.reshape(-1, by_lane.shape[1])
                by_lane[_places(lanes, block.lanes)] = mine
            labels = by_lane.reshape(-1)
        slots = dict.fromkeys(self._first_slot + lane // self._lanes_per_slot for lane in lanes)
        pixels = self._pixels(lanes, blocks)
        images, masks = split_mask(pixels.permute(0, 3, 1, 2), has_mask=self._has_mask)
        return Group(tuple(slots), images, torch.from_numpy(labels), masks)

    def _pixels(self, lanes: list[int], blocks: list[Block]) -> torch.Tensor:
        """(b, H, W, C), where the workers left them if that may be."""
        first = blocks[0].pixels
        if first is None:
            assert self._work.ring is not None
            return self._work.ring.lend(pin=self._pin_memory)
        if len(blocks) == 1 and not self._pin_memory and not first.is_shared():
            return first
        shape = (len(lanes) * (len(first) // len(blocks[0].lanes)), *first.shape[1:])
        pixels = empty_pixels(shape, first.dtype, pin=self._pin_memory)
        by_lane = pixels.numpy().reshape(len(lanes), -1)
        for block in blocks:
            assert block.pixels is not None
            mine = block.pixels.numpy().reshape(len(block.lanes), -1)
            by_lane[_places(lanes, block.lanes)] = mine
        return pixels


def _close(work: TrainingWork, pool: WorkerPool) -> None:
    if work.ring is not None:
        work.ring.close()
    pool.close()


def split_mask(planes: torch.Tensor, *, has_mask: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images and masks of what a reader yields: the mask is its last plane."""
    if not has_mask:
        return planes, None
    return planes[:, :-1], planes[:, -1:].to(torch.uint8)


def _places(lanes: list[int], wanted: list[int]) -> slice | np.ndarray:
    """Where the wanted ones stand among the lanes; a slice, which copies faster, if it can be."""
    places = np.searchsorted(lanes, wanted)
    step = int(places[1] - places[0]) if len(places) > 1 else 1
    if (np.diff(places) == step).all():
        return slice(int(places[0]), int(places[-1]) + 1, step)
    return places


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


class EvaluationStream:
    """Each image once over all ranks, in index order; iterate as often as wanted.

    Every rank yields the same number of batches, of equal sizes over the ranks: batch_size images
    each, fewer in the last one. Where images differ in shape each of these becomes several, one for
    each shape, the first of them marked. max_images: only the first so many. Nothing is drawn.
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
    ) -> None:
        self.num_images = min(index.num_samples, max_images or index.num_samples)
        self._num_batches = -(-self.num_images // (batch_size * world))
        self._has_mask = settings.has_mask
        reader = SampleReader(index, settings.without_augmentation(), seed=0)
        work = _EvaluationWork(reader, self.num_images, batch_size, rank, world)
        self._pool = WorkerPool(work, num_workers=min(workers, self._num_batches))
        self.close = weakref.finalize(self, self._pool.close)

    def __len__(self) -> int:
        """Batches that are marked as first."""
        return self._num_batches

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for parts in self._pool:
            for number, (planes, labels, samples, weights, skipped) in enumerate(parts):
                images, masks = split_mask(torch.from_numpy(planes), has_mask=self._has_mask)
                yield EvaluationBatch(
                    images=images,
                    labels=torch.from_numpy(labels),
                    samples=torch.from_numpy(samples),
                    weights=torch.from_numpy(weights),
                    skipped=tuple(skipped),
                    masks=masks,
                    is_first=number == 0,
                )


_Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[SkippedSample]]


class _EvaluationWork:
    """What one worker does: every num_workers-th batch of its rank."""

    def __init__(
        self, reader: SampleReader, num_images: int, batch_size: int, rank: int, world: int
    ) -> None:
        self.reader, self.num_images, self.batch_size = reader, num_images, batch_size
        self.rank, self.world = rank, world
        self.first_of_shard = np.cumsum(reader.index.lengths) - reader.index.lengths

    def __call__(self, worker: int, num_workers: int) -> Iterator[list[_Part]]:
        together = self.batch_size * self.world
        for low in range(worker * together, self.num_images, num_workers * together):
            in_step = min(together, self.num_images - low)
            share = -(-in_step // self.world)  # the last batch is cut evenly, then padded
            first = low + self.rank * share
            yield self._parts(first, min(first + share, low + in_step), share)

    def _parts(self, first: int, stop: int, share: int) -> list[_Part]:
        """One part for each shape, at least one; the first names what is skipped."""
        settings = self.reader.settings
        images: dict[Shape, list[tuple[int, np.ndarray, int]]] = {}
        skipped: list[SkippedSample] = []
        for sample, (shard, index, data) in enumerate(self._read(first, stop), first):
            try:
                image, label = self.reader.load(data, shard, index, epoch=0)
            except DamagedSampleError as error:
                path = self.reader.index.paths[shard]
                skipped.append(SkippedSample(path, index, str(error), None))
                continue
            images.setdefault(image.shape, []).append((sample, image, label))
        if not settings.sizes_differ or not images:
            shape = (settings.planes, *settings.size)
            return [self._part(images.get(shape, []), shape, share, skipped)]
        return [
            self._part(found, shape, len(found), [] if number else skipped)
            for number, (shape, found) in enumerate(images.items())
        ]

    def _part(
        self,
        found: Iterable[tuple[int, np.ndarray, int]],
        shape: Shape,
        count: int,
        skipped: list[SkippedSample],
    ) -> _Part:
        images = np.zeros((count, *shape), self.reader.settings.dtype)
        labels, samples = np.full((2, count), -1, np.int64)
        weights = np.zeros(count, np.float32)
        for i, (sample, image, label) in enumerate(found):
            images[i], samples[i], labels[i], weights[i] = image, sample, label, 1
        return images, labels, samples, weights, skipped

    def _read(self, first: int, stop: int) -> Iterator[tuple[int, int, memoryview]]:
        """(shard, index, bytes) of the samples first, ..., stop - 1 of the index."""
        while first < stop:
            shard = int(np.searchsorted(self.first_of_shard, first, "right")) - 1
            start = first - int(self.first_of_shard[shard])
            end = min(int(self.reader.index.lengths[shard]), start + stop - first)
            for index, data in enumerate(self.reader.read(shard, start, end), start):
                yield shard, index, data
            first += end - start
