"""A data set with features of a vision model, as shards (vae_dist.packing.encoder).

In: the model, shards of images. Out: in the folder `out`, `features-000000.tar`, ...: the samples
as they were, each with a member more (vae_dist.data.features), and last `encode.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vae_dist.config.commands import EncodeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.data.features import MEMBER, TYPE, Features, in_text
from vae_dist.distributed import Runtime
from vae_dist.inference.load import Images, open_images, open_ranks, weights_digest
from vae_dist.models.likelihoods.base import Levels
from vae_dist.objectives.alignment import VisionFeatures, load_features
from vae_dist.packing.encoder import Encoder, Sample
from vae_dist.packing.jobs import Report, ShardJob

THREADS = 4  # that read and decode
HEADER_BYTES = 256  # of the member, about


def encode_features(command: EncodeCommand) -> None:
    """Write what is missing of the folder `command.out`. Raises ConfigError."""
    config = TrainConfig()  # grey pictures too have their features in colour
    if command.resolution != "trained":
        config.data.resolution = command.resolution
    with open_ranks(command) as runtime:
        model = runtime.on_all_ranks(lambda: load_features(command.features, runtime.device))
        runtime.on_main(lambda: open_images(config, command.data, create=True))
        images = runtime.on_all_ranks(lambda: open_images(config, command.data, create=False))
        identity = {
            **{key: getattr(command, key) for key in ("features", "shard_mb", "batch_size")},
            "model": weights_digest(model),
            "data": images.index.fingerprint,
            "images": repr(dataclasses.astuple(images.settings)),
        }
        job = ShardJob(Path(command.out), "encode.json", identity)
        FeatureEncoder(job, model, images, command, runtime).run()


class FeatureEncoder(Encoder):
    name, member, keeps_images = "features", MEMBER, True

    def __init__(
        self,
        job: ShardJob,
        model: VisionFeatures,
        images: Images,
        command: EncodeCommand,
        runtime: Runtime,
    ) -> None:
        super().__init__(job, images, command, runtime, threads=THREADS)
        self.model = model

    def num_bytes(self, sample: Sample) -> int:
        rows, columns = self.model.grid(*sample.planes.shape[1:])
        return self.model.width * rows * columns * TYPE.itemsize + HEADER_BYTES

    def encoded(self, samples: Sequence[Sample]) -> list[bytes]:
        # one layout in memory: it decides the last digits
        planes = np.ascontiguousarray(np.stack([sample.planes for sample in samples]))
        levels = torch.from_numpy(planes).to(self.runtime.device)
        images = Levels(self.settings.bits).centers(levels)
        values = self.model(images).cpu().numpy().astype(TYPE)
        if not np.isfinite(values).all():
            raise ConfigError(
                f"features={self.command.features}: float16 does not hold those of sample "
                f"{samples[0].key} or one of the {len(samples)} after it; take another model"
            )
        size = in_text((images.shape[2], images.shape[3]))
        return [Features(value, self.command.features, size).to_bytes() for value in values]

    def describe(self, reports: Sequence[Report]) -> Report:
        return {"features": self.command.features, "width": self.model.width}

    def lines(self, summary: Report) -> list[str]:
        return [
            f"{summary['width']} values of {summary['features']} for each patch",
            f"train with data.train={self.command.out} objective.alignment={summary['features']}",
        ]
