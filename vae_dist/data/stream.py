"""The batches of a run, for one rank: step by step, from any step on, with any number of workers.

In: the index of the shards, their order, how to make images of them.
Out: `Batch`: this rank's images of a step, uint8 (b, C, H, W), in slot order.

Step k takes row k of every lane; a rank owns batch_size / world neighbouring lanes, and its loader
workers share them. So who reads what depends on the machine, but what step k shows does not.

A lost sample keeps its place. It is replaced by the first readable sample of its window, in the
window's permuted order; if the window has none, by that of the lane's nearest earlier window that
has one, and if there is none, by that of the nearest later one. The choice is a function of data
and position, so every world size, worker count and resume makes the same one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from vae_dist.data.index import ShardIndex
from vae_dist.data.mixing import MixedOrder
from vae_dist.data.order import Order, Window
from vae_dist.data.reader import LoadedSample, SampleReader, SkippedSample
from vae_dist.data.tar import DamagedSampleError, ShardError
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.workers import WorkerPool

MAX_LOST_IN_A_ROW = 4096  # samples of a lane; more is not damage but the wrong kind of data


class Batch(NamedTuple):
    """One rank's part of a step."""

    step: int
    images: torch.Tensor  # uint8 (b, C, H, W), in memory as (b, H, W, C)
    labels: torch.Tensor  # int64 (b,), -1 where there is none
    shards: tuple[str, ...]  # that these images came from
    skipped: tuple[SkippedSample, ...]


class _Share(NamedTuple):
    """One worker's part of a rank's step."""

    step: int
    images: torch.Tensor  # uint8, in shared memory when it comes from another process
    labels: np.ndarray
    shards: list[int]
    skipped: list[SkippedSample]


class _Donor(NamedTuple):
    """What replaces lost samples, and where the window ends that it was found in."""

    end_row: int
    name: str
    sample: LoadedSample


class TrainingStream:
    """Iterates over the batches start_step, ..., stop_step - 1 of one rank.

    The order must have batch_size lanes. `workers` loader processes (0: this process) decode.
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
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        assert order.lanes == batch_size, (order.lanes, batch_size)
        assert batch_size % world == 0, (batch_size, world)
        share = batch_size // world
        self._lanes = range(rank * share, (rank + 1) * share)
        self._paths, self._settings, self._pin_memory = index.paths, settings, pin_memory
        reader = SampleReader(index, settings, seed=order.seed)
        self._steps = range(start_step, stop_step)
        work = TrainingWork(reader, order, self._lanes, self._steps)
        self._pool = WorkerPool(work, num_workers=min(workers, share))
        self.close = weakref.finalize(self, self._pool.close)

    def __iter__(self) -> Iterator[Batch]:
        shares = iter(self._pool)
        num_parts = max(1, self._pool.num_workers)
        for _ in self._steps:
            yield self._merge([next(shares) for _ in range(num_parts)])

    def _merge(self, parts: list[_Share]) -> Batch:
        whole = len(parts) == 1 and not self._pin_memory and not parts[0].images.is_shared()
        images = (
            parts[0].images
            if whole
            else images_by_pixel(len(self._lanes), self._settings.shape, pin=self._pin_memory)
        )
        labels = torch.empty(len(self._lanes), dtype=torch.int64)
        for worker, part in enumerate(parts):
            assert part.step == parts[0].step, [part.step for part in parts]
            if not whole:
                images[worker :: len(parts)] = part.images
            labels[worker :: len(parts)] = torch.from_numpy(part.labels)
        shards = sorted({self._paths[shard] for part in parts for shard in part.shards})
        skipped = [sample for part in parts for sample in part.skipped]
        return Batch(parts[0].step, images, labels, tuple(shards), tuple(skipped))


def images_by_pixel(
    count: int, shape: tuple[int, int, int], *, pin: bool = False, shared: bool = False
) -> torch.Tensor:
    """Room for uint8 images (count, C, H, W) whose memory lies as (count, H, W, C).

    Decoders write pixel by pixel, so an image is copied in one piece, wherever it goes on its way
    to the device. shared: in memory that another process maps instead of copying it.
    """
    channels, height, width = shape
    num_bytes = count * channels * height * width
    if shared:
        storage = torch.UntypedStorage._new_shared(num_bytes)
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    else:
        flat = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin)
    return flat.view(count, height, width, channels).permute(0, 3, 1, 2)


class TrainingWork:
    """What one worker does: its lanes' share of each step."""

    def __init__(
        self, reader: SampleReader, order: Order | MixedOrder, lanes: range, steps: range
    ) -> None:
        self.reader, self.order, self.lanes, self.steps = reader, order, lanes, steps

    def __call__(self, worker: int, num_workers: int) -> Iterator[_Share]:
        lanes = [
            _Lane(self.reader, self.order, lane, self.steps.start)
            for lane in self.lanes[worker::num_workers]
        ]
        shared = get_worker_info() is not None
        for step in self.steps:
            images = images_by_pixel(len(lanes), self.reader.settings.shape, shared=shared)
            pixels = images.numpy()
            labels = np.empty(len(lanes), np.int64)
            shards: set[int] = set()
            skipped: list[SkippedSample] = []
            for i, lane in enumerate(lanes):
                pixels[i], labels[i] = lane.take(skipped, pixels[i])
                shards.add(lane.shard)
            yield _Share(step, images, labels, sorted(shards), skipped)


class _Lane:
    """One lane, read row by row: holds the undecoded samples of one window."""

    def __init__(
        self, reader: SampleReader, order: Order | MixedOrder, lane: int, row: int
    ) -> None:
        self.reader, self.order, self.lane, self.row = reader, order, lane, row
        self.shard = -1  # of the sample that was taken last
        self.window: Window | None = None
        self.samples: list[bytes] = []
        self.previous_row = -1  # first row of the window before this one
        self.donor: _Donor | None = None
        self.asked_row = -1  # first row of the window that the donor is for

    def take(self, skipped: list[SkippedSample], room: np.ndarray) -> LoadedSample:
        """The sample of this row, or its replacement, which is then noted in `skipped`.

        The image may be `room`, which is where the caller wants it.
        """
        if self.window is None or self.row == self.window.end_row:
            self.previous_row = -1 if self.window is None else self.window.first_row
            self.window = self.order.window_at(self.lane, self.row)
            self.samples = self._read(self.window)
        window, row = self.window, self.row
        self.row += 1
        position = int(window.order[row - window.first_row])
        self.shard, index = window.sample(position)
        try:
            return self._load(window, self.samples, position, room)
        except DamagedSampleError as error:
            donor = self._donor(window)
            path = self.reader.index.paths[self.shard]
            skipped.append(SkippedSample(path, index, str(error), donor.name))
            return donor.sample

    def _read(self, window: Window) -> list[bytes]:
        return [sample for run in window.runs for sample in self.reader.read(*run)]

    def _load(
        self, window: Window, samples: list[bytes], position: int, room: np.ndarray | None = None
    ) -> LoadedSample:
        shard, index = window.sample(position)
        return self.reader.load(samples[position], shard, index, epoch=window.epoch, room=room)

    def _donor(self, window: Window) -> _Donor:
        """What replaces the lost samples of the window that is being read."""
        asked_row, known = self.asked_row, self.donor
        if known is not None and asked_row == window.first_row:
            return known
        donor = self._first_readable(window, self.samples)
        if donor is None and known is not None and asked_row == self.previous_row:
            # The window before asked too: its donor is the nearest for this one as well.
            if window.first_row - known.end_row >= MAX_LOST_IN_A_ROW:
                raise self._too_many(window)
            donor = known
        self.donor = donor or self._nearest_donor(window)
        self.asked_row = window.first_row
        return self.donor

    def _first_readable(self, window: Window, samples: list[bytes]) -> _Donor | None:
        for position in window.order.tolist():
            try:
                sample = self._load(window, samples, position)
            except DamagedSampleError:
                continue
            name = self.reader.name(*window.sample(position))
            return _Donor(window.end_row, name, sample)
        return None

    def _nearest_donor(self, lost: Window) -> _Donor:
        """The donor of the nearest earlier window that has one, else of the nearest later one."""
        row = lost.first_row
        while row > 0:
            if lost.first_row - row >= MAX_LOST_IN_A_ROW:
                raise self._too_many(lost)
            window = self.order.window_at(self.lane, row - 1)
            donor = self._first_readable(window, self._read(window))
            if donor is not None:
                return donor
            row = window.first_row
        row = lost.end_row
        while row - lost.end_row < MAX_LOST_IN_A_ROW:
            window = self.order.window_at(self.lane, row)
            donor = self._first_readable(window, self._read(window))
            if donor is not None:
                return donor
            row = window.end_row
        raise self._too_many(lost)

    def _too_many(self, lost: Window) -> ShardError:
        try:
            self._load(lost, self.samples, int(lost.order[0]))
            reason = "no reason"
        except DamagedSampleError as error:
            reason = str(error)
        name = self.reader.name(*lost.sample(int(lost.order[0])))
        return ShardError(
            f"{MAX_LOST_IN_A_ROW} samples in a row cannot be read, the last is {name}: {reason}; "
            "repair the shard, or take it out of the data set"
        )


class EvaluationBatch(NamedTuple):
    """One rank's part of an evaluation batch; what pads it has weight 0 and sample -1."""

    images: torch.Tensor  # uint8 (b, C, H, W)
    labels: torch.Tensor  # int64 (b,), -1 where there is none
    samples: torch.Tensor  # int64 (b,), number in index order
    weights: torch.Tensor  # float32 (b,), 1 for an image, 0 for padding and unreadable samples
    skipped: tuple[SkippedSample, ...]


class EvaluationStream:
    """Each image once over all ranks, in index order; iterate as often as wanted.

    Every rank yields the same number of batches, of equal sizes over the ranks: batch_size images
    each, fewer in the last one. max_images: only the first so many. Nothing is drawn.
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
        reader = SampleReader(index, settings.without_augmentation(), seed=0)
        work = _EvaluationWork(reader, self.num_images, batch_size, rank, world)
        self._pool = WorkerPool(work, num_workers=min(workers, self._num_batches))
        self.close = weakref.finalize(self, self._pool.close)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for images, labels, samples, weights, skipped in self._pool:
            yield EvaluationBatch(
                images=torch.from_numpy(images),
                labels=torch.from_numpy(labels),
                samples=torch.from_numpy(samples),
                weights=torch.from_numpy(weights),
                skipped=tuple(skipped),
            )


class _EvaluationWork:
    """What one worker does: every num_workers-th batch of its rank."""

    def __init__(
        self, reader: SampleReader, num_images: int, batch_size: int, rank: int, world: int
    ) -> None:
        self.reader, self.num_images, self.batch_size = reader, num_images, batch_size
        self.rank, self.world = rank, world
        self.first_of_shard = np.cumsum(reader.index.lengths) - reader.index.lengths

    def __call__(self, worker: int, num_workers: int) -> Iterator[tuple[Any, ...]]:
        together = self.batch_size * self.world
        for low in range(worker * together, self.num_images, num_workers * together):
            in_step = min(together, self.num_images - low)
            share = -(-in_step // self.world)  # the last batch is cut evenly, then padded
            first = low + self.rank * share
            yield self._batch(first, min(first + share, low + in_step), share)

    def _batch(self, first: int, stop: int, share: int) -> tuple[Any, ...]:
        images = np.zeros((share, *self.reader.settings.shape), np.uint8)
        labels, samples = np.full((2, share), -1, np.int64)
        weights = np.zeros(share, np.float32)
        skipped: list[SkippedSample] = []
        for i, (shard, index, data) in enumerate(self._read(first, stop)):
            samples[i] = first + i
            try:
                images[i], labels[i] = self.reader.load(data, shard, index, epoch=0)
            except DamagedSampleError as error:
                path = self.reader.index.paths[shard]
                skipped.append(SkippedSample(path, index, str(error), None))
                continue
            weights[i] = 1
        return images, labels, samples, weights, skipped

    def _read(self, first: int, stop: int) -> Iterator[tuple[int, int, bytes]]:
        """(shard, index, bytes) of the samples first, ..., stop - 1 of the index."""
        while first < stop:
            shard = int(np.searchsorted(self.first_of_shard, first, "right")) - 1
            start = first - int(self.first_of_shard[shard])
            end = min(int(self.reader.index.lengths[shard]), start + stop - first)
            for index, data in enumerate(self.reader.read(shard, start, end), start):
                yield shard, index, data
            first += end - start
