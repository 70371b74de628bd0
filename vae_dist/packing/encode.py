"""The latents of a data set, as shards (vae_dist.packing.encoder).

In: a run, shards of images, the keys of `encode`. Out: in the folder `out`, `latents-000000.tar`,
..., `latents.json` (mean and spread), and last `encode.json`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae_dist.config.commands import EncodeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.loader import split_mask
from vae_dist.distributed import Runtime
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
from vae_dist.packing.encoder import Encoder, Sample
from vae_dist.packing.jobs import Report, ShardJob
from vae_dist.randomness import draws

NOT_OF_SHARDS = (
    *("run", "checkpoint", "device", "data", "out", "max_skipped_fraction", "threads"),
    "features",
)


def encode(command: EncodeCommand) -> None:
    """Write what is missing of the folder `command.out`. Raises ConfigError."""
    with open_run_on_ranks(command) as (loaded, runtime):
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
        LatentEncoder(job, loaded, images, command, runtime).run()


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


class LatentEncoder(Encoder):
    name, member = "latents", MEMBER

    def __init__(
        self,
        job: ShardJob,
        loaded: LoadedModel,
        images: Images,
        command: EncodeCommand,
        runtime: Runtime,
    ) -> None:
        super().__init__(job, images, command, runtime, threads=loaded.config.data.workers)
        self.loaded, self.model, self.keeps_images = loaded, loaded.model, command.keep_images
        self.moments = latent.LatentMoments(self.model.latent_channels, runtime.device)

    def num_bytes(self, sample: Sample) -> int:
        command, size = self.command, sample.planes.shape[1:]
        return num_bytes(
            math.prod(self.model.latent_shape(*size)),
            content=command.content,
            dtype=command.dtype,
            flip=command.flip,
        )

    @torch.inference_mode()
    def encoded(self, samples: Sequence[Sample]) -> list[bytes]:
        command, device = self.command, self.runtime.device
        # one layout in memory: it decides the last digits
        planes = np.ascontiguousarray(np.stack([sample.planes for sample in samples]))
        levels, mask = split_mask(
            torch.from_numpy(planes).to(device), has_mask=self.settings.has_mask
        )
        images = self.model.likelihood.noise_free(levels)
        labels = torch.tensor([sample.label for sample in samples], device=device)
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
            for sample, is_finite in zip(samples, values.flatten(1).isfinite().all(1), strict=True):
                if not is_finite:
                    raise ConfigError(
                        f"dtype={command.dtype} does not hold the latents of sample {sample.key}; "
                        "give dtype=bf16, or another checkpoint if its weights are not finite"
                    )
        return stored

    # the end

    def facts_of_shard(self) -> Report:
        sums = self.moments.sums.tolist()
        self.moments = latent.LatentMoments(self.model.latent_channels, self.runtime.device)
        return {"sums": sums}

    def describe(self, reports: Sequence[Report]) -> Report:
        command, loaded = self.command, self.loaded
        moments = latent.LatentMoments(self.model.latent_channels)
        for report in reports:  # in the order of the shards
            moments.add_sums(report["sums"])
        facts = {
            "run": str(Path(command.run).resolve()),
            "step": loaded.step,
            "weights": command.weights,
            "of": "means" if command.content == "mean" else "samples",
        }
        statistics = moments.statistics()
        latent.write_statistics(self.job.out / latent.STATISTICS_FILE, statistics, facts)
        return {
            **facts,
            "content": command.content,
            "dtype": command.dtype,
            "latent_channels": self.model.latent_channels,
            "stride": self.model.stride,
            "statistics": statistics.record(),
        }

    def lines(self, summary: Report) -> list[str]:
        statistics = summary["statistics"]
        return [
            f"at step {summary['step']} ({summary['weights']} weights)",
            f"scaling_factor={statistics['scaling_factor']:.5f} "
            f"shift_factor={statistics['shift_factor']:.5f} (latents.json)",
        ]
