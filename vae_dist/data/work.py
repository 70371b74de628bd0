"""What a loader process does for training: its lanes' images of each step.

In: the lanes of a rank, of which worker w of n takes w, w + n, ... Out: a `Share` for each step:
images and labels in blocks of one shape, lane by lane, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from vae_dist.data.jpeg import decode_into
from vae_dist.data.order import MixedOrder, Order
from vae_dist.data.reader import SampleReader, SkippedSample
from vae_dist.data.ring import Ring, empty_pixels
from vae_dist.data.windows import Lane

Shape = tuple[int, int, int]  # C, H, W

STEPS_AHEAD = 16


class Block(NamedTuple):
    """Images of one shape that one worker read in a step: lane by lane, row by row."""

    lanes: list[int]  # numbers among the rank's lanes, ascending
    # (b, H, W, C), in shared memory when it comes from another process; None: in the ring
    pixels: torch.Tensor | None
    labels: np.ndarray


class Share(NamedTuple):
    """One worker's part of a rank's step."""

    step: int
    blocks: list[Block]
    shards: list[int]
    skipped: list[SkippedSample]


class TrainingWork:
    """What one worker does: its lanes' share of each step."""

    def __init__(
        self, reader: SampleReader, order: Order | MixedOrder, lanes: range, steps: range
    ) -> None:
        self.reader, self.order, self.lanes, self.steps = reader, order, lanes, steps
        self.ring: Ring | None = None

    def make_ring(self, num_workers: int) -> Ring | None:
        """Rooms that the workers share; none where images differ in size."""
        settings = self.reader.settings
        self.ring = None
        if not settings.sizes_differ:
            shape = (len(self.lanes), *settings.size, settings.planes)
            self.ring = Ring(shape, settings.dtype, num_workers=num_workers)
        return self.ring

    def __call__(self, worker: int, num_workers: int) -> Iterator[Share]:
        """Ends early where the ring is closed."""
        rows = max(1, self.order.slot_rows)
        lanes = [
            Lane(self.reader, self.order, lane, self.steps.start * rows)
            for lane in self.lanes[worker::num_workers]
        ]
        numbers = list(range(len(self.lanes)))[worker::num_workers]
        ahead = _numbers(lanes)
        sizes_differ = self.reader.settings.sizes_differ
        for step in self.steps:
            skipped: list[SkippedSample] = []
            shards: set[int] = set()
            if sizes_differ:
                blocks = self._of_any_size(lanes, numbers, shards, skipped)
            elif self.ring is None:
                pixels = self._room(
                    (len(lanes), *self.reader.settings.size, self.reader.settings.planes)
                )
                labels = self._of_one_size(lanes, ahead, pixels.numpy(), shards, skipped)
                blocks = [Block(numbers, pixels, labels)]
            else:
                room = self.ring.next_room(worker)
                if room is None:
                    return
                places = room[worker::num_workers]
                labels = self._of_one_size(lanes, ahead, places, shards, skipped)
                blocks = [Block(numbers, None, labels)]
            yield Share(step, blocks, sorted(shards), skipped)

    def _of_one_size(
        self,
        lanes: list[Lane],
        ahead: Iterator[np.ndarray],
        places: np.ndarray,
        shards: set[int],
        skipped: list[SkippedSample],
    ) -> np.ndarray:
        """Decodes a row of each lane to its place (H, W, C), or copies there what is kept; returns
        the labels. `ahead` has the numbers of the samples once all are kept.

        First all is done that needs no pixels: the interpreter is several times slower just after
        a decoder has filled the caches with its own.
        """
        kept = self.reader.constant
        if kept is not None:
            has_all = kept.has_all()
            samples = next(ahead) if has_all else np.array([lane.next_number() for lane in lanes])
            labels = kept.get_all(samples, places)
            if labels is not None:
                for lane in () if has_all else lanes:  # what is ahead has passed by already
                    lane.pass_by()
                shards |= self.reader.shards_of(samples)
                return labels
        for lane in lanes:
            lane.advance()
            shards.add(lane.shard)
        plain = [lane.plain_jpeg() for lane in lanes]
        labels = np.empty(len(lanes), np.int64)
        rooms = places.transpose(0, 3, 1, 2)  # (b, C, H, W)
        for i, (lane, jpeg) in enumerate(zip(lanes, plain, strict=True)):
            if jpeg is not None and decode_into(jpeg.data, places[i]):
                labels[i] = jpeg.label
                self.reader.keep(lane.shard, lane.index, rooms[i], jpeg.label)
            else:
                rooms[i], labels[i] = lane.load(skipped, rooms[i])
        return labels

    def _of_any_size(
        self,
        lanes: list[Lane],
        numbers: list[int],
        shards: set[int],
        skipped: list[SkippedSample],
    ) -> list[Block]:
        """One block for each shape; the images of a lane share one."""
        rows = max(1, self.order.slot_rows)
        found: dict[Shape, tuple[list[int], list[np.ndarray], list[int]]] = {}
        for number, lane in zip(numbers, lanes, strict=True):
            taken = []
            for _ in range(rows):
                taken.append(lane.take(skipped))
                shards.add(lane.shard)
            shape = taken[0].image.shape
            assert all(sample.image.shape == shape for sample in taken), shape
            mine, images, labels = found.setdefault(shape, ([], [], []))
            mine.append(number)
            images += [sample.image for sample in taken]
            labels += [sample.label for sample in taken]
        return [
            Block(mine, self._joined(images), np.array(labels, np.int64))
            for mine, images, labels in found.values()
        ]

    def _joined(self, images: list[np.ndarray]) -> torch.Tensor:
        channels, height, width = images[0].shape
        pixels = self._room((len(images), height, width, channels))
        for room, image in zip(pixels.numpy(), images, strict=True):
            room[:] = image.transpose(1, 2, 0)
        return pixels

    def _room(self, shape: tuple[int, ...]) -> torch.Tensor:
        shared = get_worker_info() is not None
        return empty_pixels(shape, torch_type(self.reader.settings.dtype), shared=shared)


def _numbers(lanes: list[Lane]) -> Iterator[np.ndarray]:
    """The sample of each lane, int64 (lanes,), step by step, where all images are kept. Some steps
    at a time: windows are entered several times faster in a row than each after a step."""
    while True:
        yield from np.array([lane.next_numbers(STEPS_AHEAD) for lane in lanes]).T


def torch_type(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
