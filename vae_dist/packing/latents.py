"""From samples of shards to what is stored of them: images read and encoded, the rest carried over.

In: a reader and sample numbers in index order. Out: `Piece`s; of images of one shape, the tensors
that `encode` stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_dist.config.commands import EncodeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import MASK_MEMBER, SUFFIXES
from vae_dist.data.loader import split_mask
from vae_dist.data.reader import SampleReader, SkippedSample
from vae_dist.data.tar import DamagedSampleError, is_metadata, key_and_suffix, members
from vae_dist.inference import tiles
from vae_dist.inference.latents import MEMBER, MIRRORED, TYPES
from vae_dist.models.latent import LatentMoments, sample_posterior
from vae_dist.models.vae import VAE
from vae_dist.randomness import draws


class Sample(NamedTuple):
    number: int  # in index order
    key: str
    members: dict[str, bytes]  # that the output has beside the latents
    label: int
    planes: np.ndarray  # the image (C, H, W), with a mask as its last plane


class Piece(NamedTuple):
    """Some neighbouring samples, as they were read."""

    samples: list[Sample]
    skipped: list[SkippedSample]


def read_piece(reader: SampleReader, first: int, stop: int, *, keep_images: bool) -> Piece:
    """The samples first, ..., stop - 1 of the index. Raises ShardError."""
    piece = Piece([], [])
    for number, (shard, place, data) in enumerate(samples_in_order(reader, first, stop), first):
        try:
            image, label = reader.load(data, shard, place, epoch=0)
            key, others = carried(data, keep_images=keep_images)
            if MEMBER in others:
                raise DamagedSampleError(f"it has a .{MEMBER} already")
        except DamagedSampleError as error:
            path = reader.index.paths[shard]
            piece.skipped.append(SkippedSample(path, place, str(error), None))
        else:
            piece.samples.append(Sample(number, key, others, label, image))
    return piece


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
    """(shard, place in it, bytes) of the samples first, ..., stop - 1 of the index."""
    runs = reader.in_order(first, stop)
    places = [(run.shard, place) for run in runs for place in range(run.start, run.stop)]
    for (shard, place), data in zip(places, reader.read_runs(runs), strict=True):
        yield shard, place, data


@dataclass
class Encoder:
    """Latents of images, after the keys of `encode`."""

    model: VAE
    command: EncodeCommand
    device: torch.device
    has_mask: bool

    @torch.inference_mode()
    def __call__(
        self, samples: Sequence[Sample], moments: LatentMoments
    ) -> list[dict[str, Tensor]]:
        """The stored tensors of each image, on the CPU; all are of one shape."""
        planes = torch.from_numpy(np.stack([sample.planes for sample in samples]))
        levels, mask = split_mask(planes.to(self.device), has_mask=self.has_mask)
        numbers = [sample.number for sample in samples]
        images = self.model.likelihood.noise_free(levels)
        labels = torch.tensor([sample.label for sample in samples], device=self.device)
        mean, log_variance = self._posterior(images, labels, mask)
        moments.add(mean, None if self.command.content == "mean" else log_variance)
        stored = self._stored(mean, log_variance, numbers, "encode-posterior")
        if self.command.flip:
            mirrored = None if mask is None else mask.flip(3)
            of_mirrored = self._posterior(images.flip(3), labels, mirrored)
            other = self._stored(*of_mirrored, numbers, "encode-posterior-flip")
            stored |= {f"{name}{MIRRORED}": tensor for name, tensor in other.items()}
        stored = {name: self._converted(t, samples) for name, t in stored.items()}
        return [{name: t[row] for name, t in stored.items()} for row in range(len(samples))]

    def _posterior(
        self, images: Tensor, labels: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, float32."""
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.command.precision == "bf16"
        ):
            if self.command.tile:
                return tiles.encode(
                    self.model, images, tile=self.command.tile, labels=labels, mask=mask
                )
            return self.model.encode(images, labels, mask)

    def _stored(
        self, mean: Tensor, log_variance: Tensor, numbers: list[int], purpose: str
    ) -> dict[str, Tensor]:
        if self.command.content == "mean":
            return {"mean": mean}
        if self.command.content == "moments":
            return {"mean": mean, "log_variance": log_variance}
        noise = draws(torch.randn, self.command.seed, purpose, numbers, tuple(mean.shape[1:]))
        return {"sample": sample_posterior(mean, log_variance, noise.to(self.device))}

    def _converted(self, values: Tensor, samples: Sequence[Sample]) -> Tensor:
        values = values.to(TYPES[self.command.dtype]).cpu()
        is_finite = values.flatten(1).isfinite().all(1)
        if not is_finite.all():
            key = samples[int((~is_finite).nonzero()[0])].key
            raise ConfigError(
                f"dtype={self.command.dtype} does not hold the latents of sample {key}; give "
                "dtype=bf16, or another checkpoint if its weights are not finite"
            )
        return values
