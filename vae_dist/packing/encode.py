"""A data set to shards of latents, by any number of processes.

In: a run, shards of images, the keys of `encode`. Out: in the folder `out`, `latents-000000.tar`,
... with their offsets and `_info.json`, `latents.json` (mean and spread), and last `encode.json`
(what was done, what is left out).

Images of one shape go through the network together: neighbours of one shard, in batches that the
keys decide, so that the values do not depend on who writes what.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from vae_dist.config.commands import EncodeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.data.buckets import Size, aspect, nearest
from vae_dist.data.decode import size_of_sample
from vae_dist.data.indexing import write_info
from vae_dist.data.reader import SampleReader, single_sample
from vae_dist.data.sources import is_pipe
from vae_dist.data.tar import BLOCK, DamagedSampleError
from vae_dist.data.writer import ShardWriter
from vae_dist.distributed import Runtime
from vae_dist.files import ProgressBar
from vae_dist.inference import tiles
from vae_dist.inference.latents import MEMBER, num_bytes, to_bytes
from vae_dist.inference.load import (
    Images,
    LoadedModel,
    images_to_show,
    open_run_on_ranks,
    weights_digest,
)
from vae_dist.models.latent import STATISTICS_FILE, LatentMoments, write_statistics
from vae_dist.models.vae import VAE
from vae_dist.packing.jobs import (
    FinishedElsewhere,
    Report,
    ShardJob,
    check_lost,
    in_threads,
    print_left_out,
)
from vae_dist.packing.latents import Encoder, Piece, Sample, carried, read_piece, samples_in_order

NAME = "latents"
MIN_SHARDS = 32  # where each has MIN_PER_SHARD images: so that many processes have work
MIN_PER_SHARD = 128
NUM_PROBED = 64  # samples whose bytes are measured
WINDOW_BATCHES = 8  # that images of several shapes are sorted within
DECIDE_BYTES = (
    "content",
    "dtype",
    "flip",
    "keep_images",
    "precision",
    "seed",
    "batch_size",
    "tile",
    "weights",
    "shard_mb",
)

S = TypeVar("S")
T = TypeVar("T")


class PlannedShard(NamedTuple):
    number: int
    first: int  # number of its first sample in index order
    stop: int

    @property
    def name(self) -> str:
        return f"{NAME}-{self.number:06d}.tar"


def encode(command: EncodeCommand) -> None:
    """Write what is missing of the folder `command.out`: each rank its shards, without waiting for
    the others; the last one describes them. Raises ConfigError."""
    remedy = "ask for more memory; then the same command goes on"
    with open_run_on_ranks(command, remedy=remedy) as (loaded, runtime):
        if command.precision != "no" and runtime.device.type == "cpu":
            raise ConfigError(
                f"precision={command.precision} is for accelerators, and this is the CPU; leave it "
                "out"
            )
        tiles.tile_side(loaded.model, command.tile)  # refuses before anything is written
        if command.resolution != "trained":
            loaded.config.data.resolution = command.resolution
        images = images_to_show(loaded, command.data, runtime=runtime)
        job = ShardJob(Path(command.out), "encode.json")
        same = identity(images, loaded, command)
        if summary := runtime.on_main(lambda: job.finished(same)):
            if runtime.is_main:
                _print(command, summary)
                print("finished already; nothing is left to do")
            return
        runtime.on_main(lambda: job.begin(same))
        runtime.on_all_ranks(job.check_visible)
        try:
            _encode(job, loaded, images, command, runtime, same)
        except ConfigError as error:
            if not runtime.is_main:  # the command line shows those of rank 0 alone
                print(f"rank {runtime.rank}: {error}", file=sys.stderr)
            raise


def _encode(
    job: ShardJob,
    loaded: LoadedModel,
    images: Images,
    command: EncodeCommand,
    runtime: Runtime,
    same: dict[str, Any],
) -> None:
    started = time.monotonic()
    plan = plan_shards(images, loaded.model, command)
    missing = [shard for shard in plan if not job.is_done(shard.name)]
    num_before = plan[-1].stop - sum(shard.stop - shard.first for shard in missing)
    writer = Writer(job, loaded, images, command, runtime.device)
    for shard in plan:
        if shard not in missing:
            writer.skipped += job.report(shard.name)["skipped"]
    mine = missing[runtime.rank :: runtime.world]
    total = sum(shard.stop - shard.first for shard in mine)
    with (
        ProgressBar("encoded", total, unit="images") as progress,
        contextlib.suppress(FinishedElsewhere),
    ):
        writer.write(mine, progress if runtime.is_main else lambda done: None)
    if not all(job.is_done(shard.name) for shard in plan):
        return
    summary = job.finish(same, lambda: _describe(job, plan, loaded, command))
    _print(command, summary)
    speed = (plan[-1].stop - num_before) / max(time.monotonic() - started, 1e-9)
    print(f"images_per_second={speed:.1f} on {runtime.world} x {runtime.device.type}")


# the plan


def plan_shards(images: Images, model: VAE, command: EncodeCommand) -> list[PlannedShard]:
    """Shards of equal numbers of samples, give or take one, of about `shard_mb` each."""
    num_samples = images.index.num_samples
    total = _bytes_per_sample(images, model, command) * num_samples
    count = max(
        math.ceil(total / (command.shard_mb * 1e6)), min(MIN_SHARDS, num_samples // MIN_PER_SHARD)
    )
    count = min(max(1, count), num_samples)
    borders = [num_samples * k // count for k in range(count + 1)]
    return [PlannedShard(k, low, high) for k, (low, high) in enumerate(pairwise(borders))]


def identity(images: Images, loaded: LoadedModel, command: EncodeCommand) -> dict[str, Any]:
    """All that decides the bytes of the shards, by name; JSON."""
    settings = images.settings.without_augmentation()
    model = loaded.config
    return {
        **{key: getattr(command, key) for key in DECIDE_BYTES},
        "step": loaded.step,
        "model": weights_digest(loaded.model),
        "data": images.index.fingerprint,
        "resolution": str(model.data.resolution),
        "images": repr(dataclasses.astuple(settings)),
        "likelihood": repr((*dataclasses.astuple(model.likelihood), model.data.dequantize)),
    }


def _bytes_per_sample(images: Images, model: VAE, command: EncodeCommand) -> float:
    """Of a shard of latents, measured on some samples."""
    reader = SampleReader(images.index, images.settings, seed=0)
    num_samples = images.index.num_samples
    found = []
    for number in range(0, num_samples, max(1, num_samples // NUM_PROBED)):
        for shard, _, data in samples_in_order(reader, number, number + 1):
            try:
                size = _size(reader, data, shard)
                _, others = carried(data, keep_images=command.keep_images)
            except DamagedSampleError:
                continue
            latent = num_bytes(
                math.prod(model.latent_shape(*size)),
                content=command.content,
                dtype=command.dtype,
                flip=command.flip,
            )
            lengths = [latent, *map(len, others.values())]
            found.append(sum(BLOCK + -(-length // BLOCK) * BLOCK for length in lengths))
    return sum(found) / len(found) if found else 1.0


def _size(reader: SampleReader, data: bytes | memoryview, shard: int) -> Size:
    """(H, W) that the image will have. Raises DamagedSampleError."""
    settings = reader.settings
    if not settings.sizes_differ:
        return settings.size
    sample = single_sample(data, reader.index.paths[shard])
    own = size_of_sample(sample, max_pixels=settings.max_pixels)
    return nearest(settings.buckets, aspect(own)) if settings.buckets else own


# the shards


class Writer:
    """Writes shards one after the other."""

    def __init__(
        self,
        job: ShardJob,
        loaded: LoadedModel,
        images: Images,
        command: EncodeCommand,
        device: torch.device,
    ) -> None:
        self.job, self.images, self.command, self.device = job, images, command, device
        is_in_order = any(map(is_pipe, images.index.paths))  # a command gives its bytes once
        self.threads = 1 if is_in_order else max(1, loaded.config.data.workers)
        self.encoder = Encoder(loaded.model, command, device, images.settings.has_mask)
        self.num_channels = loaded.model.latent_channels
        self.skipped: list[str] = []  # of all shards that this process knows of

    def write(self, shards: Sequence[PlannedShard], progress: Callable[[int], None]) -> None:
        """Raises ConfigError for what the disk refuses and when too much cannot be read."""
        settings, count = self.images.settings.without_augmentation(), self.command.batch_size
        reader = SampleReader(self.images.index, settings, seed=0)
        pieces = in_threads(
            lambda piece: read_piece(reader, *piece, keep_images=self.command.keep_images),
            (
                (first, min(first + count, shard.stop))
                for shard in shards
                for first in range(shard.first, shard.stop, count)
            ),
            threads=self.threads,
        )
        self._progress, self._num_done = progress, 0
        for shard in shards:
            with self.job.shard(shard.name) as (writer, report):
                report |= self._write_shard(writer, shard, pieces)

    def _write_shard(
        self, writer: ShardWriter, shard: PlannedShard, pieces: Iterator[Piece]
    ) -> Report:
        moments = LatentMoments(self.num_channels, self.device)
        sizes: Counter[str] = Counter()
        skipped: list[str] = []
        for window in self._windows(shard, pieces):
            for sample, size, tensors in self._encoded(window, moments):
                sizes[f"{size[0]}x{size[1]}"] += 1
                write_sample(writer, sample, {MEMBER: to_bytes(tensors, size)})
            lost = [str(sample) for piece in window for sample in piece.skipped]
            skipped += lost
            self.skipped += lost
            _check_lost(self.command, self.skipped, self.images.index.num_samples)
            self._num_done += sum(len(piece.samples) + len(piece.skipped) for piece in window)
            self._progress(self._num_done)
        return {
            "samples": sizes.total(),
            "skipped": skipped,
            "sizes": sizes,
            "sums": moments.sums.tolist(),
        }

    def _windows(self, shard: PlannedShard, pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
        """The pieces of a shard, so many at a time that few batches are small."""
        at_once = WINDOW_BATCHES if self.images.settings.sizes_differ else 1
        num_pieces = -(-(shard.stop - shard.first) // self.command.batch_size)
        for start in range(0, num_pieces, at_once):
            yield [next(pieces) for _ in range(min(at_once, num_pieces - start))]

    def _encoded(
        self, window: Sequence[Piece], moments: LatentMoments
    ) -> list[tuple[Sample, Size, dict[str, Tensor]]]:
        """The samples of the window in order, each with the (H, W) of its image and its latents."""
        samples = [sample for piece in window for sample in piece.samples]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for place, sample in enumerate(samples):
            by_shape.setdefault(sample.planes.shape, []).append(place)
        found: dict[int, dict[str, Tensor]] = {}
        for places in by_shape.values():
            for start in range(0, len(places), self.command.batch_size):
                rows = places[start : start + self.command.batch_size]
                encoded = self.encoder([samples[row] for row in rows], moments)
                found |= dict(zip(rows, encoded, strict=True))
        return [
            (sample, sample.planes.shape[1:], found[place]) for place, sample in enumerate(samples)
        ]


def write_sample(writer: ShardWriter, sample: Sample, latent: dict[str, bytes]) -> None:
    try:
        writer.write({"__key__": sample.key, **sample.members, **latent})
    except ConfigError:
        raise
    except ValueError as error:  # as tarfile refuses a long name
        raise ConfigError(
            f"sample {sample.key!r} cannot be written ({error}); give it a shorter key"
        ) from None


# the end


def _check_lost(command: EncodeCommand, lost: Sequence[str], total: int) -> None:
    limit = command.max_skipped_fraction
    check_lost(lost, of=f"data={shown(command.data)}", total=total, max_skipped_fraction=limit)


def _describe(
    job: ShardJob, plan: Sequence[PlannedShard], loaded: LoadedModel, command: EncodeCommand
) -> dict[str, Any]:
    """Write index and statistics; the summary."""
    reports = [job.report(shard.name) for shard in plan]
    skipped = [name for report in reports for name in report["skipped"]]
    _check_lost(command, skipped, plan[-1].stop)
    num_samples = sum(report["samples"] for report in reports)
    if not num_samples:
        raise ConfigError(f"data={shown(command.data)}: no image can be read; {skipped[0]}")
    moments = LatentMoments(loaded.model.latent_channels)
    sizes: Counter[str] = Counter()
    for report in reports:  # in the order of the shards
        moments.add_sums(report["sums"])
        sizes.update(report["sizes"])
    facts = {
        "run": str(Path(command.run).resolve()),
        "step": loaded.step,
        "weights": command.weights,
        "of": "means" if command.content == "mean" else "samples",
    }
    write_statistics(job.out / STATISTICS_FILE, moments.statistics(), facts)
    write_info([job.out / shard.name for shard in plan], split=NAME)
    return {
        **facts,
        "data": command.data,
        "content": command.content,
        "dtype": command.dtype,
        "samples": num_samples,
        "skipped": skipped,
        "shards": len(plan),
        "bytes": sum((job.out / shard.name).stat().st_size for shard in plan),
        "image_sizes": dict(sizes.most_common(20)),
        "latent_channels": loaded.model.latent_channels,
        "stride": loaded.model.stride,
        "statistics": moments.statistics().record(),
    }


def _print(command: EncodeCommand, summary: Report) -> None:
    skipped = summary["skipped"]
    print_left_out(skipped, summary=Path(command.out) / "encode.json")
    print(
        f"{command.out}: latents of {summary['samples']:,} images ({len(skipped)} left out) in "
        f"{summary['shards']} shards, {summary['bytes'] / 1e6:.1f} MB, at step {summary['step']} "
        f"({summary['weights']} weights)"
    )
    statistics = summary["statistics"]
    print(
        f"scaling_factor={statistics['scaling_factor']:.5f} "
        f"shift_factor={statistics['shift_factor']:.5f} (latents.json)"
    )
