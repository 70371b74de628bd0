"""Samples of shards, read by loader processes: images to encode, and what is carried over.

In: pieces of the data set, (number of the output shard, first sample, stop). Out: `Piece`s in that
order: images by shape, and the other members of each sample byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_dist.data.decode import MASK_MEMBER, SUFFIXES
from vae_dist.data.reader import SampleReader, SkippedSample
from vae_dist.data.tar import DamagedSampleError, is_metadata, key_and_suffix, members
from vae_dist.inference.latents import MEMBER

Shape = tuple[int, ...]


class CarriedSample(NamedTuple):
    """What a sample of the output has beside its latents."""

    number: int  # in index order
    key: str
    members: dict[str, bytes]
    label: int


class Piece(NamedTuple):
    """Some neighbouring samples of one shard, as a loader process read them."""

    shard: int  # number in the plan
    num_samples: int  # with those that are skipped
    samples: list[CarriedSample]
    images: dict[Shape, tuple[list[int], Tensor]]  # places in `samples`, (b, planes, H, W)
    skipped: list[SkippedSample]


class Reading:
    """What one loader process does: every num_workers-th piece of this rank's shards."""

    def __init__(
        self, reader: SampleReader, pieces: Sequence[tuple[int, int, int]], *, keep_images: bool
    ) -> None:
        self.reader, self.pieces, self.keep_images = reader, pieces, keep_images

    def __call__(self, worker: int, num_workers: int) -> Iterator[Piece]:
        for shard, first, stop in self.pieces[worker::num_workers]:
            yield self._piece(shard, first, stop)

    def _piece(self, number: int, first: int, stop: int) -> Piece:
        samples: list[CarriedSample] = []
        skipped: list[SkippedSample] = []
        found: dict[Shape, tuple[list[int], list[np.ndarray]]] = {}
        in_order = samples_in_order(self.reader, first, stop)
        for sample, (shard, place, data) in enumerate(in_order, first):
            try:
                image, label = self.reader.load(data, shard, place, epoch=0)
                key, members = carried(data, keep_images=self.keep_images)
                if MEMBER in members:
                    raise DamagedSampleError(f"it has a .{MEMBER} already")
            except DamagedSampleError as error:
                path = self.reader.index.paths[shard]
                skipped.append(SkippedSample(path, place, str(error), None))
                continue
            places, pixels = found.setdefault(image.shape, ([], []))
            places.append(len(samples))
            pixels.append(image)
            samples.append(CarriedSample(sample, key, members, label))
        images = {
            shape: (places, torch.from_numpy(np.stack(pixels)))
            for shape, (places, pixels) in found.items()
        }
        return Piece(number, stop - first, samples, images, skipped)


def carried(data: bytes | memoryview, *, keep_images: bool) -> tuple[str, dict[str, bytes]]:
    """Key and members of a sample, by their suffixes as they are written, without its image.

    Raises DamagedSampleError.
    """
    found: dict[str, bytes] = {}
    sample_key = ""
    for name, content in members(data):
        if is_metadata(name):
            continue
        key, suffix = key_and_suffix(name)
        if key is not None and (keep_images or not is_image(suffix)):
            found[suffix] = bytes(content)
        sample_key = key or sample_key
    return sample_key, found


def is_image(suffix: str) -> bool:
    suffix = suffix.lower()
    return suffix.rpartition(".")[2] in SUFFIXES and suffix != MASK_MEMBER


def samples_in_order(
    reader: SampleReader, first: int, stop: int
) -> Iterator[tuple[int, int, memoryview]]:
    """(shard, place in it, bytes) of the samples first, ..., stop - 1 of the index, one read for
    each shard that they lie in."""
    lengths = reader.index.lengths
    firsts = np.cumsum(lengths) - lengths
    shard = int(np.searchsorted(firsts, first, "right")) - 1
    while shard < len(lengths) and firsts[shard] < stop:
        low = max(first - int(firsts[shard]), 0)
        high = min(stop - int(firsts[shard]), int(lengths[shard]))
        if low < high:
            for place, data in enumerate(reader.read(shard, low, high), low):
                yield shard, place, data
        shard += 1
