"""A data set to shards of latents, by any number of processes.

In: a run, shards of images, the keys of `encode`. Out: in the folder `out`, `latents-000000.tar`,
... with their offsets and `_info.json`, `latents.json` (mean and spread), and last `encode.json`
(what was done, what is left out).

Images of one shape go through the network together: neighbours of one shard, in batches that the
keys decide, so that the values do not depend on who writes what.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_dist.config.commands import EncodeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.data.decode import MASK_MEMBER, SUFFIXES
from vae_dist.data.indexing import write_info
from vae_dist.data.loader import split_mask
from vae_dist.data.reader import SkippedSample
from vae_dist.data.sources import is_pipe
from vae_dist.data.tar import BLOCK, DamagedSampleError, is_metadata, key_and_suffix, members
from vae_dist.distributed import Runtime
from vae_dist.files import ProgressBar, printable, redacted
from vae_dist.inference import tiles
from vae_dist.inference.latents import MEMBER, MIRRORED, TYPES, num_bytes, to_bytes
from vae_dist.inference.load import (
    Images,
    LoadedModel,
    images_to_show,
    open_run_on_ranks,
    weights_digest,
)
from vae_dist.models import latent
from vae_dist.packing.items import suffix_of
from vae_dist.packing.jobs import (
    FinishedElsewhere,
    Report,
    ShardJob,
    check_lost,
    cut,
    print_left_out,
)
from vae_dist.randomness import draws

NAME = "latents"
MIN_SHARDS = 32  # of a large set: so that many processes have work
NUM_PROBED = 64  # samples whose bytes are measured
WINDOW_BATCHES = 8  # that images of several shapes are sorted within
NOT_OF_SHARDS = ("run", "checkpoint", "device", "data", "out", "max_skipped_fraction", "threads")


class PlannedShard(NamedTuple):
    name: str
    first: int  # number of its first sample in index order
    stop: int


class Sample(NamedTuple):
    number: int  # in index order
    key: str
    members: dict[str, bytes]  # that the output has beside the latents
    label: int
    planes: np.ndarray  # the image (C, H, W), with a mask as its last plane


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
        if loaded.model.num_levels and command.content != "mean":
            raise ConfigError(
                f"content={command.content}: a group of a ladder has other moments for each draw "
                "of the groups above it; give content=mean"
            )
        if command.resolution != "trained":
            loaded.config.data.resolution = command.resolution
        images = images_to_show(loaded, command.data, runtime=runtime)
        job = ShardJob(Path(command.out), "encode.json", identity(images, loaded, command))
        if summary := runtime.on_main(job.finished):
            if runtime.is_main:
                _print(command, summary)
                print("finished already; nothing is left to do")
            return
        runtime.on_main(job.begin)
        runtime.on_all_ranks(job.check_visible)
        try:
            _Encoder(job, loaded, images, command, runtime).encode()
        except FinishedElsewhere:
            return
        except ConfigError as error:
            if not runtime.is_main:  # the command line shows those of rank 0 alone
                print(f"rank {runtime.rank}: {printable(error)}", file=sys.stderr)
            raise


def identity(images: Images, loaded: LoadedModel, command: EncodeCommand) -> dict[str, Any]:
    """All that decides the bytes of the shards, by name; JSON."""
    model = loaded.config
    return {
        **{key: value for key, value in vars(command).items() if key not in NOT_OF_SHARDS},
        "step": loaded.step,
        "model": weights_digest(loaded.model),
        "data": images.index.fingerprint,
        "resolution": str(model.data.resolution),
        "images": repr(dataclasses.astuple(images.settings.without_augmentation())),
        "likelihood": repr((*dataclasses.astuple(model.likelihood), model.data.dequantize)),
    }


class _Encoder:
    """Reads samples, encodes their images, and writes the shards of one rank."""

    def __init__(
        self,
        job: ShardJob,
        loaded: LoadedModel,
        images: Images,
        command: EncodeCommand,
        runtime: Runtime,
    ) -> None:
        self.job, self.loaded, self.command, self.runtime = job, loaded, command, runtime
        self.model, self.settings = loaded.model, images.settings.without_augmentation()
        self.num_samples = images.index.num_samples
        self.reader = images.reader()
        is_in_order = any(map(is_pipe, images.index.paths))  # a command gives its bytes once
        self.threads = 1 if is_in_order else max(1, loaded.config.data.workers)
        self.skipped: list[str] = []  # of all shards that this process knows of

    def encode(self) -> None:
        started, runtime = time.monotonic(), self.runtime
        plan = self._plan()
        # asked once for all ranks: one that is late sees shards that others have just written
        done: dict[str, list[str]] = runtime.on_main(
            lambda: {
                s.name: self.job.report(s.name)["skipped"] for s in plan if self.job.is_done(s.name)
            }
        )
        missing = [shard for shard in plan if shard.name not in done]
        self.skipped = [text for skipped in done.values() for text in skipped]
        mine = missing[runtime.rank :: runtime.world]
        total = sum(shard.stop - shard.first for shard in mine)
        with ProgressBar("encoded", total, unit="images") as progress:
            self._write(mine, progress if runtime.is_main else lambda done: None)
        if not all(self.job.is_done(shard.name) for shard in plan):
            return
        _print(self.command, self.job.finish(lambda: self._describe(plan)))
        num_images = sum(shard.stop - shard.first for shard in missing)
        speed = num_images / max(time.monotonic() - started, 1e-9)
        print(f"images_per_second={speed:.1f} on {runtime.world} x {runtime.device.type}")

    def _plan(self) -> list[PlannedShard]:
        """Shards of equal numbers of samples, give or take one, of about `shard_mb` each, after the
        bytes of some samples."""
        sizes, command, num_samples = [], self.command, self.num_samples
        for number in range(0, num_samples, max(1, num_samples // NUM_PROBED)):
            for sample in self._read((number, number + 1)):
                if isinstance(sample, Sample):
                    stored = num_bytes(
                        math.prod(self.model.latent_shape(*sample.planes.shape[1:])),
                        content=command.content,
                        dtype=command.dtype,
                        flip=command.flip,
                    )
                    lengths = [stored, *map(len, sample.members.values())]
                    sizes.append(sum(BLOCK + -(-length // BLOCK) * BLOCK for length in lengths))
        total = sum(sizes) / max(1, len(sizes)) * num_samples
        count = math.ceil(total / (command.shard_mb * 1e6))
        parts = enumerate(cut(num_samples, count, at_least=MIN_SHARDS))
        return [PlannedShard(f"{NAME}-{k:06d}.tar", *part) for k, part in parts]

    # reading

    def _read(self, piece: tuple[int, int]) -> list[Sample | str]:
        """Samples by their numbers in the index; of unreadable ones the text. Raises ShardError."""
        found: list[Sample | str] = []
        runs = self.reader.in_order(*piece)
        places = [(run.shard, place) for run in runs for place in range(run.start, run.stop)]
        samples = zip(places, self.reader.read_runs(runs), strict=True)
        for number, ((shard, place), data) in enumerate(samples, piece[0]):
            try:
                image, label = self.reader.load(data, shard, place, epoch=0)
                key, others = carried(data, keep_images=self.command.keep_images)
            except DamagedSampleError as error:
                path = self.reader.index.paths[shard]
                found.append(str(SkippedSample(path, place, str(error), None)))
            else:
                found.append(Sample(number, key, others, label, image))
        return found

    def _read_ahead(self, pieces: Iterable[tuple[int, int]]) -> Iterator[list[Sample | str]]:
        """`_read` of the pieces, in their order, by threads that are some pieces ahead."""
        waiting: deque[Future[list[Sample | str]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            for piece in pieces:
                waiting.append(pool.submit(self._read, piece))
                if len(waiting) > 2 * self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    # writing

    def _write(self, shards: Sequence[PlannedShard], progress: Callable[[int], None]) -> None:
        """Raises ConfigError for what the disk refuses and when too much cannot be read."""
        count = self.command.batch_size
        at_once = WINDOW_BATCHES if self.settings.sizes_differ else 1  # so few batches are small
        starts = {s: range(s.first, s.stop, count) for s in shards}
        pieces = self._read_ahead((at, min(at + count, s.stop)) for s in shards for at in starts[s])
        num_done = 0
        for shard in shards:
            moments = latent.LatentMoments(self.model.latent_channels, self.runtime.device)
            sizes: Counter[str] = Counter()
            skipped: list[str] = []
            with self.job.shard(shard.name) as (writer, report):
                for start in range(0, len(starts[shard]), at_once):
                    num_pieces = len(starts[shard][start : start + at_once])
                    window = [found for piece in islice(pieces, num_pieces) for found in piece]
                    lost = [found for found in window if isinstance(found, str)]
                    samples = [found for found in window if isinstance(found, Sample)]
                    tensors = self._encoded(samples, moments)
                    for sample, of_sample in zip(samples, tensors, strict=True):
                        height, width = sample.planes.shape[1:]
                        sizes[f"{height}x{width}"] += 1
                        file = {MEMBER: to_bytes(of_sample, (height, width))}
                        writer.write({"__key__": sample.key, **sample.members, **file})
                    skipped += lost
                    self.skipped += lost
                    check_lost(self.command, "data", self.skipped, total=self.num_samples)
                    num_done += len(window)
                    progress(num_done)
                report |= {"samples": sizes.total(), "skipped": skipped, "sizes": sizes}
                report["sums"] = moments.sums.tolist()

    def _encoded(
        self, samples: Sequence[Sample], moments: latent.LatentMoments
    ) -> Iterator[dict[str, Tensor]]:
        """The tensors of each sample, in order; images of one shape are encoded together."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for place, sample in enumerate(samples):
            by_shape.setdefault(sample.planes.shape, []).append(place)
        found: dict[int, dict[str, Tensor]] = {}
        count = self.command.batch_size
        for places in by_shape.values():
            for start in range(0, len(places), count):
                rows = places[start : start + count]
                tensors = self._encode_batch([samples[row] for row in rows], moments)
                for i, row in enumerate(rows):
                    found[row] = {name: tensor[i] for name, tensor in tensors.items()}
        return (found[place] for place in range(len(samples)))

    @torch.inference_mode()
    def _encode_batch(
        self, samples: Sequence[Sample], moments: latent.LatentMoments
    ) -> dict[str, Tensor]:
        """The stored tensors of images of one shape, on the CPU."""
        command, device = self.command, self.runtime.device
        # one layout in memory: it decides the last digits
        planes = np.ascontiguousarray(np.stack([sample.planes for sample in samples]))
        levels, mask = split_mask(
            torch.from_numpy(planes).to(device), has_mask=self.settings.has_mask
        )
        images = self.model.likelihood.noise_free(levels)
        labels = torch.tensor([sample.label for sample in samples], device=device)
        mean, log_variance = self._posterior(images, labels, mask)
        moments.add(mean, None if command.content == "mean" else log_variance)
        stored = self._stored(samples, mean, log_variance, "encode-posterior")
        if command.flip:
            mirrored = None if mask is None else mask.flip(3)
            of_mirrored = self._posterior(images.flip(3), labels, mirrored)
            others = self._stored(samples, *of_mirrored, "encode-posterior-flip")
            stored |= {f"{name}{MIRRORED}": tensor for name, tensor in others.items()}
        return stored

    def _posterior(
        self, images: Tensor, labels: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, float32."""
        is_narrow, tile = self.command.precision == "bf16", self.command.tile
        with torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=is_narrow):
            if tile:
                return tiles.encode(self.model, images, tile=tile, labels=labels, mask=mask)
            return self.model.encode(images, labels, mask)

    def _stored(
        self, samples: Sequence[Sample], mean: Tensor, log_variance: Tensor, purpose: str
    ) -> dict[str, Tensor]:
        command, stored = self.command, {"mean": mean}
        if command.content == "moments":
            stored["log_variance"] = log_variance
        elif command.content == "sample":
            numbers = [sample.number for sample in samples]
            noise = draws(torch.randn, command.seed, purpose, numbers, tuple(mean.shape[1:]))
            stored = {"sample": latent.sample_posterior(mean, log_variance, noise.to(mean.device))}
        for name, values in stored.items():
            stored[name] = values = values.to(TYPES[command.dtype]).cpu()
            for sample, is_finite in zip(samples, values.flatten(1).isfinite().all(1), strict=True):
                if not is_finite:
                    raise ConfigError(
                        f"dtype={command.dtype} does not hold the latents of sample {sample.key}; "
                        "give dtype=bf16, or another checkpoint if its weights are not finite"
                    )
        return stored

    # the end

    def _describe(self, plan: Sequence[PlannedShard]) -> Report:
        """Write index and statistics; the summary."""
        out, command, loaded = self.job.out, self.command, self.loaded
        reports = [self.job.report(shard.name) for shard in plan]
        skipped = [name for report in reports for name in report["skipped"]]
        check_lost(command, "data", skipped, total=self.num_samples)
        num_samples = sum(report["samples"] for report in reports)
        if not num_samples:
            raise ConfigError(f"data={shown(command.data)}: no image can be read; {skipped[0]}")
        moments = latent.LatentMoments(self.model.latent_channels)
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
        latent.write_statistics(out / latent.STATISTICS_FILE, moments.statistics(), facts)
        write_info([out / shard.name for shard in plan], split=NAME)
        return {
            **facts,
            "data": redacted(command.data),
            "content": command.content,
            "dtype": command.dtype,
            "samples": num_samples,
            "skipped": skipped,
            "shards": len(plan),
            "bytes": sum((out / shard.name).stat().st_size for shard in plan),
            "image_sizes": dict(sizes.most_common(20)),
            "latent_channels": self.model.latent_channels,
            "stride": self.model.stride,
            "statistics": moments.statistics().record(),
        }


def carried(data: bytes | memoryview, *, keep_images: bool) -> tuple[str, dict[str, bytes]]:
    """Key and members of a sample, by their suffixes as they are written, without its images.
    Raises DamagedSampleError."""
    found: dict[str, bytes] = {}
    sample_key = ""
    for name, content in members(data):
        key, suffix = key_and_suffix(name)
        if key is None or is_metadata(name):
            continue
        is_image = suffix_of(f".{suffix}") in SUFFIXES and suffix.lower() != MASK_MEMBER
        if keep_images or not is_image:
            found[suffix] = bytes(content)
        sample_key = key
    if MEMBER in found:
        raise DamagedSampleError(f"it has a .{MEMBER} already")
    return sample_key, found


def _print(command: EncodeCommand, summary: Report) -> None:
    skipped, statistics = summary["skipped"], summary["statistics"]
    print_left_out(skipped, summary=Path(command.out) / "encode.json")
    print(
        f"{command.out}: latents of {summary['samples']:,} images ({len(skipped)} left out) in "
        f"{summary['shards']} shards, {summary['bytes'] / 1e6:.1f} MB, at step {summary['step']} "
        f"({summary['weights']} weights)"
    )
    print(
        f"scaling_factor={statistics['scaling_factor']:.5f} "
        f"shift_factor={statistics['shift_factor']:.5f} (latents.json)"
    )
