"""The batches of a run, for one rank: step by step, from any step on, with any number of workers.

In: the index of the shards, their order, how to make images of them.
Out: `Batch`: this rank's images of a step in groups of one shape, each in slot order.

Step k takes the next sample of each of the order's sequences (lanes). A rank owns neighbouring
ones, batch_size / world of them, and its loader workers share these. With aspect buckets a slot
owns one sequence, and step k takes its next batch_size / slots samples, which share a size
(`vae_dist.data.windows`). So who reads what depends on the machine, but what step k shows does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from vae_dist.data.index import ShardIndex
from vae_dist.data.order import MixedOrder, Order
from vae_dist.data.reader import SampleReader, SkippedSample
from vae_dist.data.sources import START_RETRY_S
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.windows import ReadAhead, WindowReader
from vae_dist.data.workers import SharedBatches, WorkerPool, empty_images

Shape = tuple[int, ...]


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
        self._per_slot = share // slots  # sequences
        self._first_slot = rank * slots
        self._paths, self._pin_memory = index.paths, pin_memory
        self._has_mask, self._steps = settings.has_mask, range(start_step, stop_step)
        workers = min(workers, share)
        reader = SampleReader(
            index,
            settings,
            seed=order.seed,
            cache_bytes=cache_bytes // max(1, workers),
            retry_s=retry_s,
        )
        self._shared: SharedBatches | None = None
        if workers and not settings.sizes_differ:
            shape = (share, *settings.size, settings.planes)
            self._shared = SharedBatches(shape, settings.dtype)
        sequences = range(rank * share, (rank + 1) * share)
        work = _TrainingWork(reader, order, sequences, self._steps, self._shared)
        self._pool = WorkerPool(work, num_workers=workers)
        self.close = weakref.finalize(self, self._pool.close)

    def __iter__(self) -> Iterator[Batch]:
        parts = iter(self._pool)
        for step in self._steps:
            of_step = [next(parts) for _ in range(max(1, self._pool.num_workers))]
            assert all(part.step == step for part in of_step), [part.step for part in of_step]
            yield self._merged(step, of_step)

    def _merged(self, step: int, parts: list[_Part]) -> Batch:
        if self._shared is not None:
            images, labels = self._shared[step]
            blocks = [_Block(list(range(len(images))), torch.from_numpy(images), labels)]
            groups = [self._group(blocks, is_shared=True)]
        else:
            by_shape: dict[Shape, list[_Block]] = {}
            for block in (block for part in parts for block in part.blocks):
                by_shape.setdefault(block.images.shape[1:], []).append(block)
            groups = sorted(map(self._group, by_shape.values()), key=lambda group: group.slots)
        shards = sorted({self._paths[shard] for part in parts for shard in part.shards})
        skipped = [sample for part in parts for sample in part.skipped]
        return Batch(step, tuple(groups), tuple(shards), tuple(skipped))

    def _group(self, blocks: list[_Block], *, is_shared: bool = False) -> Group:
        """The workers' images of one shape, sequence by sequence."""
        sequences, pixels, labels = blocks[0]
        if len(blocks) > 1:
            order = np.argsort([number for block in blocks for number in block.sequences])
            sequences = sorted(number for block in blocks for number in block.sequences)
            joined = torch.cat([block.images for block in blocks])
            rows = len(joined) // len(sequences)
            pixels = joined.view(-1, rows, *joined.shape[1:])[order].view(joined.shape)
            labels = np.concatenate([block.labels for block in blocks])
            labels = labels.reshape(-1, rows)[order].reshape(-1)
        if self._pin_memory:
            pinned = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            pixels = pinned.copy_(pixels)
        elif is_shared:
            pixels = pixels.clone()
        slots = dict.fromkeys(self._first_slot + n // self._per_slot for n in sequences)
        images, masks = split_mask(pixels.permute(0, 3, 1, 2), has_mask=self._has_mask)
        return Group(tuple(slots), images, torch.from_numpy(labels.copy()), masks)


class _Block(NamedTuple):
    """Images of one shape that one worker read in a step: sequence by sequence, row by row."""

    sequences: list[int]  # numbers among the rank's, ascending
    images: torch.Tensor  # (b, H, W, C)
    labels: np.ndarray


class _Part(NamedTuple):
    """One worker's part of a rank's step; without blocks it lies in the shared batch."""

    step: int
    blocks: list[_Block]
    shards: set[int]
    skipped: list[SkippedSample]


class _TrainingWork:
    """What one worker does: its sequences' part of each step."""

    def __init__(
        self,
        reader: SampleReader,
        order: Order | MixedOrder,
        sequences: range,
        steps: range,
        shared: SharedBatches | None,
    ) -> None:
        self.reader, self.order, self.sequences = reader, order, sequences
        self.steps, self.shared = steps, shared

    def __call__(self, worker: int, num_workers: int) -> Iterator[_Part]:
        rows, settings = max(1, self.order.slot_rows), self.reader.settings
        read_ahead = ReadAhead(self.reader)
        start = self.steps.start * rows
        mine = [
            WindowReader(self.reader, self.order, sequence, start, read_ahead)
            for sequence in self.sequences[worker::num_workers]
        ]
        numbers = list(range(len(self.sequences)))[worker::num_workers]
        try:
            for step in self.steps:
                skipped: list[SkippedSample] = []
                blocks: list[_Block] = []
                if settings.sizes_differ:
                    blocks, shards = self._of_any_size(mine, numbers, skipped)
                elif self.shared is not None:
                    images, labels = (memory[worker::num_workers] for memory in self.shared[step])
                    shards = self._of_one_size(mine, images, labels, skipped)
                else:
                    shape = (len(mine), *settings.size, settings.planes)
                    images = empty_images(shape, settings.dtype)
                    labels = np.empty(len(mine), np.int64)
                    shards = self._of_one_size(mine, images, labels, skipped)
                    blocks = [_Block(numbers, torch.from_numpy(images), labels)]
                yield _Part(step, blocks, shards, skipped)
        finally:
            read_ahead.close()

    def _of_one_size(
        self,
        readers: list[WindowReader],
        images: np.ndarray,
        labels: np.ndarray,
        skipped: list[SkippedSample],
    ) -> set[int]:
        """A sample of each into `images` (b, H, W, C) and `labels`; the shards they come from.

        All samples are prepared before the first one is decoded: the interpreter is several times
        slower just after a decoder has filled the caches with its own.
        """
        places = [(reader, reader.advance(1).start) for reader in readers]
        numbers = np.array([reader.numbers[place] for reader, place in places])
        cached = self.reader.take_cached(numbers, out=images)
        if cached is not None:
            labels[:] = cached
            return self.reader.shards_of(numbers)
        outs = list(images.transpose(0, 3, 1, 2))  # (C, H, W) each
        prepared = [
            reader.prepare(place, out=out)
            for (reader, place), out in zip(places, outs, strict=True)
        ]
        for i, (reader, place) in enumerate(places):
            image, labels[i] = reader.load(place, prepared[i], skipped)
            if image is not outs[i]:
                outs[i][:] = image
        return self.reader.shards_of(numbers)

    def _of_any_size(
        self, readers: list[WindowReader], numbers: list[int], skipped: list[SkippedSample]
    ) -> tuple[list[_Block], set[int]]:
        """One block for each shape; the images of a sequence share one."""
        found: dict[Shape, tuple[list[int], list[np.ndarray], list[int]]] = {}
        shards: set[int] = set()
        for number, reader in zip(numbers, readers, strict=True):
            places = reader.advance(max(1, self.order.slot_rows))
            shards |= self.reader.shards_of(np.array([reader.numbers[p] for p in places]))
            loaded = [reader.load(p, reader.prepare(p), skipped) for p in places]
            shape = loaded[0].image.shape
            assert all(sample.image.shape == shape for sample in loaded), shape
            mine, images, labels = found.setdefault(shape, ([], [], []))
            mine.append(number)
            images += [sample.image.transpose(1, 2, 0) for sample in loaded]
            labels += [sample.label for sample in loaded]
        blocks = [
            _Block(mine, torch.from_numpy(np.stack(images)), np.array(labels, np.int64))
            for mine, images, labels in found.values()
        ]
        return blocks, shards


def split_mask(planes: torch.Tensor, *, has_mask: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images and masks of what a reader yields: the mask is its last plane."""
    if not has_mask:
        return planes, None
    return planes[:, :-1], planes[:, -1:].to(torch.uint8)
