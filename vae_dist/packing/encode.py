"""The latents of a data set, or features of a vision model, as shards (vae_dist.packing.encoder).

In: a run or the vision model, shards of images, the keys of `encode`. Out: in the folder `out`,
`latents-000000.tar`, ..., `latents.json` (mean and spread), and last `encode.json`; or
`features-000000.tar`, ...: the samples as they were, each with a member more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vae_dist.config.commands import EncodeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.data import features
from vae_dist.data.loader import split_mask
from vae_dist.inference import tiles
from vae_dist.inference.latents import HEADER_BYTES, MEMBER, MIRRORED, TYPES, num_bytes, to_bytes
from vae_dist.inference.load import (
    LoadedModel,
    images_to_show,
    open_images,
    open_ranks,
    open_run_on_ranks,
    weights_digest,
)
from vae_dist.models import latent
from vae_dist.models.likelihoods.base import Levels
from vae_dist.objectives.alignment import VisionFeatures, load_features
from vae_dist.packing.encoder import Encoder, Sample
from vae_dist.packing.jobs import Report
from vae_dist.randomness import draws

NOT_OF_SHARDS = (
    *("run", "checkpoint", "device", "data", "out", "max_skipped_fraction", "threads"),
    *("features", "image_key", "background"),
)


def encode(command: EncodeCommand) -> None:
    """Write what is missing of the folder `command.out`. Raises ConfigError."""
    with open_run_on_ranks(command) as (loaded, runtime):
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
        images, config = images_to_show(loaded, command.data, runtime=runtime), loaded.config
        identity = {
            **{key: value for key, value in vars(command).items() if key not in NOT_OF_SHARDS},
            "step": loaded.step,
            "model": weights_digest(loaded.model),
            "resolution": str(config.data.resolution),
            "likelihood": repr((*dataclasses.astuple(config.likelihood), config.data.dequantize)),
        }
        LatentEncoder(loaded, images, command, runtime, identity).run()


class LatentEncoder(Encoder):
    name, member = "latents", MEMBER
    network: LoadedModel

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model = self.network.model
        self.moments = latent.LatentMoments(self.model.latent_channels, self.runtime.device)

    def num_bytes(self, sample: Sample) -> int:
        command, size = self.command, sample.planes.shape[1:]
        return num_bytes(
            math.prod(self.model.latent_shape(*size)),
            **{key: getattr(command, key) for key in ("content", "dtype", "flip")},
        )

    @torch.inference_mode()
    def encoded(self, samples: Sequence[Sample], planes: Tensor) -> list[bytes]:
        command = self.command
        levels, mask = split_mask(planes, has_mask=self.settings.has_mask)
        images = self.model.likelihood.noise_free(levels)
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
            if not values.isfinite().all():
                raise ConfigError(
                    f"dtype={command.dtype} does not hold the latents of sample {samples[0].key} "
                    f"or one of the {len(samples)} after it; give dtype=bf16, or another checkpoint"
                )
        return stored

    def facts_of_shard(self) -> Report:
        sums = self.moments.sums.tolist()
        self.moments = latent.LatentMoments(self.model.latent_channels, self.runtime.device)
        return {"sums": sums}

    def describe(self, reports: Sequence[Report]) -> Report:
        command, moments = self.command, latent.LatentMoments(self.model.latent_channels)
        for report in reports:  # in the order of the shards
            moments.sums += moments.sums.new_tensor(report["sums"])
        facts = {
            "run": str(Path(command.run).resolve()),
            "step": self.network.step,
            "weights": command.weights,
            "of": "means" if command.content == "mean" else "samples",
        }
        statistics = moments.statistics()
        latent.write_statistics(self.job.out / latent.STATISTICS_FILE, statistics | facts)
        factors = {key: statistics[key] for key in ("scaling_factor", "shift_factor")}
        return facts | factors


def encode_features(command: EncodeCommand) -> None:
    """The same with features of a vision model. Raises ConfigError."""
    config = TrainConfig()  # grey pictures too have their features in colour
    config.data.image_key, config.data.background = command.image_key, command.background
    if command.resolution != "trained":
        config.data.resolution = command.resolution
    with open_ranks(command) as runtime:
        model = runtime.on_all_ranks(lambda: load_features(command.features, runtime.device))
        runtime.on_main(lambda: open_images(config, command.data, create=True))
        images = runtime.on_all_ranks(lambda: open_images(config, command.data, create=False))
        identity = {
            **{key: getattr(command, key) for key in ("features", "shard_mb", "batch_size")},
            "model": weights_digest(model),
        }
        FeatureEncoder(model, images, command, runtime, identity).run()


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
