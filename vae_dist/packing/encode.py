"""Shards of a data set once more, with latents or features of each image.

In: shards of images, a run or a vision model, the keys of `encode`. Out: in the folder `out`,
`latents-000000.tar`, ... with their index, `latents.json` (mean and spread), and last
`encode.json`; or `features-000000.tar`, ...: the samples as they were, each with a member more.

Any number of processes share the work. Images of one shape go through the network together:
neighbours of one shard, in batches that the keys decide, so that the values do not depend on who
writes what.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_dist.config.commands import EncodeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.config.schema import TrainConfig
from vae_dist.data import features
from vae_dist.data.decode import MASK_MEMBER, SUFFIXES
from vae_dist.data.index import write_info
from vae_dist.data.loader import split_mask
from vae_dist.data.reader import SkippedSample, single_sample
from vae_dist.data.sources import is_pipe
from vae_dist.data.tar import BLOCK, DamagedSampleError
from vae_dist.distributed import Runtime
from vae_dist.files import progress_bar, redacted
from vae_dist.inference import load, tiles
from vae_dist.inference.latents import HEADER_BYTES, MEMBER, MIRRORED, TYPES, num_bytes, to_bytes
from vae_dist.models import latent
from vae_dist.models.likelihoods.base import Levels
from vae_dist.models.vae import VAE
from vae_dist.objectives.alignment import VisionFeatures, load_features
from vae_dist.packing.jobs import Report, ShardJob, check_lost, cut, print_left_out
from vae_dist.randomness import draws

NOT_OF_SHARDS = ("run", "checkpoint", "device", "data", "out", "max_skipped_fraction", "threads")
MIN_SHARDS = 32  # of a large set: so that many processes have work
NUM_PROBED = 64  # samples whose bytes are measured
NUM_THREADS = 4  # that read and decode
WINDOW_BATCHES = 8  # that images of several shapes are sorted within

Plan = dict[str, range]  # by shard: the numbers of its samples, in index order


class Sample(NamedTuple):
    number: int  # in index order
    key: str
    members: dict[str, bytes]  # that the output has beside the latents
    label: int
    planes: np.ndarray  # the image (C, H, W), with a mask as its last plane


@dataclass
class Encoder(ABC):
    """Reads samples, encodes their images, and writes the shards of one rank."""

    network: Any  # a module
    images: load.Images
    command: EncodeCommand
    runtime: Runtime
    facts: dict[str, Any]  # that decide the bytes of the shards, beside keys and images; JSON
    name: ClassVar[str]  # of the shards
    member: ClassVar[str]  # suffix of what is added to a sample

    def __post_init__(self) -> None:
        index, self.settings = self.images.index, self.images.settings.without_augmentation()
        identity = {
            **{key: value for key, value in vars(self.command).items() if key not in NOT_OF_SHARDS},
            "model": load.weights_digest(self.network),
            "data": index.fingerprint,
            "images": repr(astuple(self.settings)),
        }
        self.job = ShardJob(Path(self.command.out), "encode.json", identity | self.facts)
        self.num_samples, self.reader = index.num_samples, self.images.reader()
        # a command gives its bytes once, in order
        self.threads = 1 if any(map(is_pipe, index.paths)) else NUM_THREADS

    @abstractmethod
    def num_bytes(self, sample: Sample) -> int:
        """Of what is added to it, about."""

    @abstractmethod
    def encoded(self, samples: Sequence[Sample], planes: Tensor) -> list[bytes]:
        """What is added to each; planes: theirs, on the device. Raises ConfigError."""

    def facts_of_shard(self) -> Report:
        """What is to be kept of the shard that was just written."""
        return {}

    @abstractmethod
    def describe(self, reports: Sequence[Report]) -> Report:
        """What the summary and the last line say, of the reports of all shards."""

    def run(self) -> None:
        """Write what is missing in the folder: each rank its shards. Raises ConfigError."""
        job, runtime = self.job, self.runtime
        if runtime.on_main(job.is_finished):
            if runtime.is_main:
                print(f"{job.out}: finished already; nothing is left to do")
            return
        runtime.on_main(job.begin)
        plan = runtime.on_main(self._plan)
        missing = runtime.on_main(lambda: [name for name in plan if not job.is_done(name)])
        mine = {name: plan[name] for name in missing[runtime.rank :: runtime.world]}
        runtime.on_all_ranks(lambda: self._write(mine))
        if runtime.is_main:
            with job.writing():
                self._finish(list(plan))

    def _plan(self) -> Plan:
        """Shards of equal numbers of samples, give or take one, of about `shard_mb` each, after the
        bytes of some samples."""
        sizes, num_samples = [], self.num_samples
        for number in range(0, num_samples, max(1, num_samples // NUM_PROBED)):
            for sample in self._read(range(number, number + 1)):
                if isinstance(sample, Sample):
                    lengths = [self.num_bytes(sample), *map(len, sample.members.values())]
                    sizes.append(sum(BLOCK + -(-length // BLOCK) * BLOCK for length in lengths))
        total = sum(sizes) / max(1, len(sizes)) * num_samples
        count = math.ceil(total / (self.command.shard_mb * 1e6))
        parts = enumerate(cut(num_samples, count, at_least=MIN_SHARDS))
        return {f"{self.name}-{k:06d}.tar": range(*part) for k, part in parts}

    # reading

    def _read(self, numbers: range) -> list[Sample | str]:
        """Samples by their numbers in the index; of unreadable ones the text. Raises ShardError."""
        found: list[Sample | str] = []
        runs = self.reader.in_order(numbers.start, numbers.stop)
        places = [(run.shard, place) for run in runs for place in range(run.start, run.stop)]
        samples = zip(numbers, places, self.reader.read(runs), strict=True)
        for number, (shard, place), data in samples:
            path = self.reader.index.paths[shard]
            try:
                image, label, _ = self.reader.load(data, shard, place, epoch=0)
                sample = single_sample(data, path)
                carried = self._carried(sample)
            except DamagedSampleError as error:
                found.append(str(SkippedSample(path, place, str(error), None)))
            else:
                found.append(Sample(number, sample["__key__"], carried, label, image))
        return found

    def _carried(self, sample: Mapping[str, Any]) -> dict[str, bytes]:
        """The members that are written again, by suffix. Raises DamagedSampleError."""
        if self.member in sample:
            raise DamagedSampleError(f"it has a .{self.member} already")
        left_out = () if self.command.keep_images or self.command.features else SUFFIXES
        return {
            name: bytes(content)
            for name, content in sample.items()
            if name == MASK_MEMBER or (name[:2] != "__" and name.rpartition(".")[2] not in left_out)
        }

    def _read_ahead(self, pieces: Iterable[range]) -> Iterator[list[Sample | str]]:
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

    def _write(self, plan: Plan) -> None:
        """Raises ConfigError for what the disk refuses and when too much cannot be read."""
        count, num_done = self.command.batch_size, 0
        # several shapes in a window of several batches, so that few of a shape's are small
        at_once = WINDOW_BATCHES * count if self.settings.sizes_differ else count
        pieces = self._read_ahead(
            numbers[at : at + count]
            for numbers in plan.values()
            for at in range(0, len(numbers), count)
        )
        lost: list[str] = []
        with progress_bar("encoded", sum(map(len, plan.values())), unit="images") as progress:
            for name, numbers in plan.items():
                num_lost = len(lost)
                with self.job.shard(name) as (writer, report):
                    for start in range(0, len(numbers), at_once):
                        num_pieces = len(numbers[start : start + at_once : count])
                        window = [found for piece in islice(pieces, num_pieces) for found in piece]
                        samples = [found for found in window if isinstance(found, Sample)]
                        for sample, file in zip(samples, self._by_shape(samples), strict=True):
                            added = {**sample.members, self.member: file}
                            writer.write({"__key__": sample.key, **added})
                        lost += [found for found in window if isinstance(found, str)]
                        check_lost(self.command, "data", lost, total=self.num_samples)
                        num_done += len(window)
                        progress(num_done)
                    skipped = lost[num_lost:]
                    facts = {"samples": len(numbers) - len(skipped), "skipped": skipped}
                    report |= facts | self.facts_of_shard()

    def _by_shape(self, samples: Sequence[Sample]) -> list[bytes]:
        """`encoded` of each sample, in order; images of one shape are encoded together."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for place, sample in enumerate(samples):
            by_shape.setdefault(sample.planes.shape, []).append(place)
        found: dict[int, bytes] = {}
        count = self.command.batch_size
        for places in by_shape.values():
            for start in range(0, len(places), count):
                rows = places[start : start + count]
                part = [samples[row] for row in rows]
                # one layout in memory: it decides the last digits
                planes = np.ascontiguousarray(np.stack([sample.planes for sample in part]))
                files = self.encoded(part, torch.from_numpy(planes).to(self.runtime.device))
                found |= zip(rows, files, strict=True)
        return [found[place] for place in range(len(samples))]

    # the end

    def _finish(self, shards: Sequence[str]) -> None:
        """Write the index and the summary, and say what was done."""
        reports = [self.job.report(name) for name in shards]
        skipped = [name for report in reports for name in report["skipped"]]
        check_lost(self.command, "data", skipped, total=self.num_samples)
        num_samples = sum(report["samples"] for report in reports)
        facts = {"samples": num_samples, "shards": len(shards), **self.describe(reports)}
        write_info([self.job.out / name for name in shards], split=self.name)
        self.job.finish({**facts, "data": redacted(self.command.data), "skipped": skipped})
        print_left_out(skipped, summary=self.job.out / self.job.summary)
        words = " ".join(f"{key}={shown(value)}" for key, value in facts.items())
        ranks = f"{self.runtime.world} x {self.runtime.device.type}"
        print(f"{self.job.out}: {self.name} by {ranks}, {len(skipped)} images left out, {words}")


# latents


def encode(command: EncodeCommand) -> None:
    """Write what is missing of the folder `command.out`. Raises ConfigError."""
    with load.open_run_on_ranks(command) as (loaded, runtime):
        if command.precision != "no" and runtime.device.type == "cpu":
            raise ConfigError(f"precision={command.precision} is for accelerators; leave it out")
        tiles.tile_side(loaded.model, command.tile)  # refuses before anything is written
        if loaded.model.num_levels and command.content != "mean":
            raise ConfigError(
                f"content={command.content}: a group of a ladder has other moments for each draw "
                "of the groups above it; give content=mean"
            )
        if command.resolution != "trained":
            loaded.config.data.resolution = command.resolution
        images, config = load.images_to_show(loaded, command.data, runtime=runtime), loaded.config
        facts = {
            "step": loaded.step,
            "resolution": str(config.data.resolution),
            "likelihood": repr((*astuple(config.likelihood), config.data.dequantize)),
        }
        LatentEncoder(loaded.model, images, command, runtime, facts).run()


class LatentEncoder(Encoder):
    name, member = "latents", MEMBER
    network: VAE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.moments = latent.LatentMoments(self.network.latent_channels, self.runtime.device)

    def num_bytes(self, sample: Sample) -> int:
        keys = {key: getattr(self.command, key) for key in ("content", "dtype", "flip")}
        return num_bytes(math.prod(self.network.latent_shape(*sample.planes.shape[1:])), **keys)

    @torch.inference_mode()
    def encoded(self, samples: Sequence[Sample], planes: Tensor) -> list[bytes]:
        command = self.command
        levels, mask = split_mask(planes, has_mask=self.settings.has_mask)
        images = self.network.likelihood.noise_free(levels)
        labels = torch.tensor([sample.label for sample in samples], device=planes.device)
        mean, log_variance = self._posterior(images, labels, mask)
        self.moments.add(mean, None if command.content == "mean" else log_variance)
        stored = self._stored(samples, mean, log_variance, "encode-posterior")
        if command.flip:
            mirrored = None if mask is None else mask.flip(3)
            of_mirrored = self._posterior(images.flip(3), labels, mirrored)
            others = self._stored(samples, *of_mirrored, "encode-posterior-flip")
            stored |= {f"{name}{MIRRORED}": tensor for name, tensor in others.items()}
        height, width = images.shape[-2:]
        return [
            to_bytes({name: tensor[i] for name, tensor in stored.items()}, (height, width))
            for i in range(len(samples))
        ]

    def _posterior(
        self, images: Tensor, labels: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, float32."""
        is_narrow, tile = self.command.precision == "bf16", self.command.tile
        with torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=is_narrow):
            if tile:
                return tiles.encode(self.network, images, tile=tile, labels=labels, mask=mask)
            return self.network.encode(images, labels, mask)

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
            if not values.isfinite().all():
                raise ConfigError(
                    f"dtype={command.dtype} does not hold the latents of sample {samples[0].key} "
                    f"or one of the {len(samples)} after it; give dtype=bf16, or another checkpoint"
                )
        return stored

    def facts_of_shard(self) -> Report:
        sums = self.moments.sums.tolist()
        self.moments = latent.LatentMoments(self.network.latent_channels, self.runtime.device)
        return {"sums": sums}

    def describe(self, reports: Sequence[Report]) -> Report:
        command, moments = self.command, latent.LatentMoments(self.network.latent_channels)
        for report in reports:  # in the order of the shards
            moments.sums += moments.sums.new_tensor(report["sums"])
        facts = {
            "run": str(Path(command.run).resolve()),
            "step": self.facts["step"],
            "weights": command.weights,
            "of": "means" if command.content == "mean" else "samples",
        }
        statistics = moments.statistics()
        latent.write_statistics(self.job.out / latent.STATISTICS_FILE, statistics | facts)
        factors = {key: statistics[key] for key in ("scaling_factor", "shift_factor")}
        return facts | factors


# features


def encode_features(command: EncodeCommand) -> None:
    """The same with features of a vision model. Raises ConfigError."""
    config = TrainConfig()  # grey pictures too have their features in colour
    config.data.image_key, config.data.background = command.image_key, command.background
    if command.resolution != "trained":
        config.data.resolution = command.resolution
    with load.open_ranks(command) as runtime:
        model = runtime.on_all_ranks(lambda: load_features(command.features, runtime.device))
        runtime.on_main(lambda: load.open_images(config, command.data, create=True))
        images = runtime.on_all_ranks(lambda: load.open_images(config, command.data, create=False))
        FeatureEncoder(model, images, command, runtime, {}).run()


class FeatureEncoder(Encoder):
    name, member = "features", features.MEMBER
    network: VisionFeatures

    def num_bytes(self, sample: Sample) -> int:
        num_values = self.network.width * math.prod(self.network.grid(*sample.planes.shape[1:]))
        return num_values * features.TYPE.itemsize + HEADER_BYTES

    def encoded(self, samples: Sequence[Sample], planes: Tensor) -> list[bytes]:
        values = self.network(Levels(self.settings.bits).centers(planes)).half().cpu()
        if not values.isfinite().all():
            raise ConfigError(
                f"features={self.command.features}: float16 does not hold those of sample "
                f"{samples[0].key} or one of the {len(samples)} after it; take another model"
            )
        size = features.in_text((planes.shape[2], planes.shape[3]))
        facts = self.command.features, size, self.command.image_key
        return [features.Features(value, *facts).to_bytes() for value in values.numpy()]

    def describe(self, reports: Sequence[Report]) -> Report:
        return {"features": self.command.features, "width": self.network.width}
