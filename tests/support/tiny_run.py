"""A finished run folder without training: a small model of random weights, and shards of digits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vae_dist.config.schema import TrainConfig
from vae_dist.data.writer import write_shards
from vae_dist.models.build import build_vae
from vae_dist.run.folder import RunFolder

STEPS = (10, 20)


def tiny_config(
    *, latent: str = "vector", kind: str = "bernoulli", channels: int = 1, num_classes: int = 0
) -> TrainConfig:
    config = TrainConfig()
    config.config = "tiny"
    config.data.train = config.data.validation = "shards"
    config.data.channels = channels
    config.data.workers = 0
    config.model.latent = latent  # type: ignore[assignment]
    config.model.latent_channels = 3
    config.model.channels = [8, 8]
    config.model.blocks = 1
    config.model.attention = False
    config.model.norm_groups = 4
    config.model.num_classes = num_classes
    config.likelihood.kind = kind  # type: ignore[assignment]
    return config


def write_images(folder: Path, images: np.ndarray) -> None:
    """uint8 (N, H, W) or (N, H, W, 3) as one shard; an image of zeros is written as no PNG."""

    def encode(image: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        return file.getvalue()

    samples = (
        {"__key__": f"{number:04d}", "png": encode(image) if image.any() else b"no PNG"}
        for number, image in enumerate(images)
    )
    write_shards(samples, folder, num_shards=1, name="images")


def write_run(folder: Path, config: TrainConfig, image_size: tuple[int, int]) -> RunFolder:
    """A run folder with two checkpoints, whose model and ema weights all differ."""
    run = RunFolder(folder)
    run.create()
    config.run = str(folder)
    run.write_config(config)
    for step in STEPS:
        tensors = {}
        for offset, name in enumerate(("model", "ema")):
            config.seed = step + offset
            model = build_vae(config, image_size)
            with torch.no_grad():  # decoders may start at zero: give each its own picture
                for parameter in model.parameters():
                    parameter.add_(0.05)
            tensors[name] = model.state_dict()
        run.checkpoints.save(step, tensors, {"image_size": list(image_size)}, keep_last=2)
    config.seed = 0
    return run
