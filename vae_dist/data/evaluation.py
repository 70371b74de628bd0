"""The images of a data set for an evaluation: each once over all ranks, in index order.

In: the index of the shards and how to make images of them. Out: `EvaluationBatch`es, of equal
numbers on all ranks. Nothing is drawn.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vae_dist.data.index import Run, ShardIndex
from vae_dist.data.loader import Shape, split_mask
from vae_dist.data.reader import LoadedSample, SampleReader, SkippedSample
from vae_dist.data.sources import START_RETRY_S
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.windows import ReadAhead
from vae_dist.data.workers import WorkerPool


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
            for number, (planes, labels, samples, weights, skipped) in enumerate(parts):
                images, masks = split_mask(torch.from_numpy(planes), has_mask=self._has_mask)
                yield EvaluationBatch(
                    images,
                    torch.from_numpy(labels),
                    torch.from_numpy(samples),
                    torch.from_numpy(weights),
                    tuple(skipped),
                    masks,
                    is_first=number == 0,
                )


# (b, planes, H, W) of one shape, labels, samples, weights, and what else an EvaluationBatch has
_Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[SkippedSample]]


@dataclass
class _EvaluationParts:
    """What one worker does: every num_workers-th batch of its rank."""

    reader: SampleReader
    num_images: int
    batch_size: int
    rank: int
    world: int

    def __call__(self, worker: int, num_workers: int) -> Iterator[list[_Part]]:
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

    def _parts(self, runs: list[Run], data: list[memoryview], first: int, size: int) -> list[_Part]:
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
            return [(*self._arrays(found.get(shape, []), shape, size), skipped)]
        parts = [self._arrays(images, shape, len(images)) for shape, images in found.items()]
        return [(*part, [] if number else skipped) for number, part in enumerate(parts)]

    def _arrays(
        self, found: list[tuple[int, LoadedSample]], shape: Shape, size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        images = np.zeros((size, *shape), self.reader.settings.dtype)
        labels, samples = np.full((2, size), -1, np.int64)
        weights = np.zeros(size, np.float32)
        for i, (number, loaded) in enumerate(found):
            images[i], samples[i], labels[i], weights[i] = loaded.image, number, loaded.label, 1
        return images, labels, samples, weights
