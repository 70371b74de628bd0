"""Finished run folders without training: small models of random weights, and their images."""

import io

import numpy as np
import torch
from PIL import Image

from vae_dist.config.schema import TrainConfig
from vae_dist.data.writer import write_shards
from vae_dist.models.build import build_vae
from vae_dist.run.folder import RunFolder


def tiny_config(*, latent="vector", kind="bernoulli", channels=1, num_classes=0):
    config = TrainConfig(config="tiny")
    config.data.train = config.data.validation = "shards"
    config.data.channels, config.data.workers = channels, 0
    config.data.max_skipped_fraction = 0.5  # an image of `plain_run` is lost
    config.model.latent, config.model.latent_channels = latent, 3
    config.model.channels, config.model.norm_groups = [8, 8], 4
    config.model.blocks, config.model.attention = 1, False
    config.model.num_classes, config.likelihood.kind = num_classes, kind
    return config


def random_pixels(*shape):
    return np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)


def run_with_images(folder, config, pixels):
    """`folder/run`, and `folder/images` for training and validation."""
    write_images(folder / "images", pixels, num_classes=config.model.num_classes)
    config.data.train = config.data.validation = str(folder / "images")
    write_run(folder / "run", config, (pixels.shape[1], pixels.shape[2]))
    return folder / "run"


def write_images(folder, images, *, num_classes=0, num_shards=1):
    """uint8 (N, H, W) or (N, H, W, 3); an image of zeros is written as no PNG. Labels are 0, 1,
    ..., num_classes - 1, 0, ..."""

    def sample(number, image):
        Image.fromarray(image).save(file := io.BytesIO(), "PNG")
        found = {"__key__": f"{number:04d}"}
        found["png"] = file.getvalue() if image.any() else b"no PNG"
        return found | ({"cls": str(number % num_classes).encode()} if num_classes else {})

    samples = (sample(number, image) for number, image in enumerate(images))
    write_shards(samples, folder, num_shards=num_shards, name="images")


def write_run(folder, config, image_size):
    """A run folder with two checkpoints, whose model and ema weights all differ."""
    run = RunFolder(folder)
    run.create()
    config.run = str(folder)
    run.write_config(config)
    for step in (10, 20):
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
