"""Shards of latents, one after the other, each all or nothing.

In: a model, images, the planned shards of this rank. Out: in the folder, for each shard, the tar,
its offsets `.tar.idx`, and a report `.encode/reports/<shard>.json`. The tar is renamed into place
last: a shard that bears its name is whole.

Images of one shape go through the network together: neighbours of one shard, in batches that the
plan decides, so that the values do not depend on who writes what.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.config.commands import EncodeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.index import index_shard, write_sidecar
from vae_dist.data.loader import split_mask
from vae_dist.data.reader import SampleReader
from vae_dist.data.workers import WorkerPool
from vae_dist.data.writer import ShardWriter
from vae_dist.files import sync_folder, write_durably
from vae_dist.inference import tiles
from vae_dist.inference.encoding.plan import PlannedShard
from vae_dist.inference.encoding.reading import CarriedSample, Piece, Reading, Shape
from vae_dist.inference.latents import MEMBER, MIRRORED, TYPES, to_bytes
from vae_dist.inference.load import Images, LoadedModel
from vae_dist.models.latent import LatentMoments, sample_posterior
from vae_dist.models.vae import VAE
from vae_dist.randomness import draws

WORK = ".encode"  # in the folder while it is written
WINDOW_BATCHES = 8  # that images of several shapes are sorted within
NUM_NAMED = 5  # damaged images that a message shows


class EncodedSample(NamedTuple):
    carried: CarriedSample
    image_size: tuple[int, int]
    tensors: dict[str, Tensor]  # that are stored


@dataclass
class Done:
    """What a rank has done since it started."""

    num_samples: int = 0
    num_skipped: int = 0
    skipped: list[str] = field(default_factory=list)  # the first ones


class Encoder:
    """Latents of images, after the keys of `encode`."""

    def __init__(self, model: VAE, command: EncodeCommand, device: torch.device) -> None:
        self.model, self.command, self.device = model, command, device

    @torch.inference_mode()
    def __call__(
        self,
        planes: Tensor,
        samples: Sequence[CarriedSample],
        moments: LatentMoments,
        *,
        has_mask: bool,
    ) -> list[dict[str, Tensor]]:
        """The stored tensors of each image (b, planes, H, W) of one shape, on the CPU."""
        levels, mask = split_mask(planes.to(self.device), has_mask=has_mask)
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

    def _converted(self, values: Tensor, samples: Sequence[CarriedSample]) -> Tensor:
        values = values.to(TYPES[self.command.dtype]).cpu()
        is_finite = values.flatten(1).isfinite().all(1)
        if not is_finite.all():
            key = samples[int((~is_finite).nonzero()[0])].key
            raise ConfigError(
                f"dtype={self.command.dtype} does not hold the latents of sample {key}; give "
                "dtype=bf16, or another checkpoint if its weights are not finite"
            )
        return values


class Writing:
    """Writes shards one after the other; `done` counts."""

    def __init__(
        self,
        loaded: LoadedModel,
        images: Images,
        command: EncodeCommand,
        device: torch.device,
        folder: Path,
    ) -> None:
        self.images, self.command, self.folder = images, command, folder
        self.workers = loaded.config.data.workers
        self.device = device
        self.encoder = Encoder(loaded.model, command, device)
        self.num_channels = loaded.model.latent_channels
        self.done = Done()

    def write(self, shards: Sequence[PlannedShard]) -> Generator[None]:
        """Yields now and then. Raises OSError, ConfigError."""
        settings = self.images.settings.without_augmentation()
        reader, count = SampleReader(self.images.index, settings, seed=0), self.command.batch_size
        parts = [
            (shard.number, first, min(first + count, shard.stop))
            for shard in shards
            for first in range(shard.first, shard.stop, count)
        ]
        reading = Reading(reader, parts, keep_images=self.command.keep_images)
        pool = WorkerPool(reading, num_workers=min(self.workers, len(parts)))
        with contextlib.closing(pool):
            pieces = iter(pool)
            for shard in shards:
                yield from self._write_shard(shard, pieces)

    def _write_shard(self, shard: PlannedShard, pieces: Iterator[Piece]) -> Iterator[None]:
        work = self.folder / WORK
        partial = work / "tmp" / f"{shard.name}.{os.uname().nodename}.{os.getpid()}"
        moments = LatentMoments(self.num_channels, self.device)
        sizes: Counter[str] = Counter()
        skipped: list[str] = []
        writer = ShardWriter(partial)
        written: Future[None] | None = None
        try:
            # a window is written while the next one is encoded
            with ThreadPoolExecutor(1) as pen:
                for window in self._windows(shard, pieces):
                    encoded = self._encoded(window, moments)
                    sizes.update(f"{size[0]}x{size[1]}" for _, size, _ in encoded)
                    if written is not None:
                        written.result()
                    written = pen.submit(_write, writer, encoded)
                    for piece in window:
                        skipped += map(str, piece.skipped)
                        self._count(piece)
                    yield
                if written is not None:
                    written.result()
            writer.close()
            report = {
                "samples": sum(sizes.values()),
                "skipped": skipped,
                "sizes": sizes,
                "sums": moments.sums.tolist(),
            }
            target = self.folder / shard.name
            write_durably(report_path(self.folder, shard), json.dumps(report).encode())
            write_sidecar(target, index_shard(partial))
            os.replace(partial, target)
            sync_folder(target.parent)
        finally:
            partial.unlink(missing_ok=True)

    def _windows(self, shard: PlannedShard, pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
        """The pieces of a shard, so many at a time that few batches are small."""
        together = WINDOW_BATCHES if self.images.settings.sizes_differ else 1
        left = shard.stop - shard.first
        while left:
            window: list[Piece] = []
            while left and len(window) < together:
                piece = next(pieces)
                assert piece.shard == shard.number, (piece.shard, shard.number)
                left -= piece.num_samples
                window.append(piece)
            yield window

    def _encoded(self, window: Sequence[Piece], moments: LatentMoments) -> list[EncodedSample]:
        """The samples of the window in order."""
        samples = [sample for piece in window for sample in piece.samples]
        by_shape: dict[Shape, tuple[list[int], list[Tensor]]] = {}
        first = 0
        for piece in window:
            for shape, (places, planes) in piece.images.items():
                mine, parts = by_shape.setdefault(shape, ([], []))
                mine += [first + place for place in places]
                parts.append(planes)
            first += len(piece.samples)
        found: dict[int, tuple[tuple[int, int], dict[str, Tensor]]] = {}
        for shape, (places, parts) in by_shape.items():
            planes, count = torch.cat(parts), self.command.batch_size
            for start in range(0, len(places), count):
                rows = places[start : start + count]
                encoded = self.encoder(
                    planes[start : start + count],
                    [samples[row] for row in rows],
                    moments,
                    has_mask=self.images.settings.has_mask,
                )
                size = (shape[1], shape[2])
                found |= {row: (size, one) for row, one in zip(rows, encoded, strict=True)}
        return [EncodedSample(sample, *found[place]) for place, sample in enumerate(samples)]

    def _count(self, piece: Piece) -> None:
        self.done.num_samples += piece.num_samples
        self.done.num_skipped += len(piece.skipped)
        room = NUM_NAMED - len(self.done.skipped)
        self.done.skipped += [str(lost) for lost in piece.skipped[: max(0, room)]]


def _write(writer: ShardWriter, samples: Sequence[EncodedSample]) -> None:
    for carried, size, tensors in samples:
        latent = {MEMBER: to_bytes(tensors, size)}
        try:
            writer.write({"__key__": carried.key, **carried.members, **latent})
        except ConfigError:
            raise
        except ValueError as error:  # as tarfile refuses a long name
            raise ConfigError(
                f"sample {carried.key!r} cannot be written ({error}); give it a shorter key"
            ) from None


def report_path(folder: Path, shard: PlannedShard) -> Path:
    return folder / WORK / "reports" / f"{shard.name}.json"


def is_written(folder: Path, shard: PlannedShard) -> bool:
    return (folder / shard.name).exists()
