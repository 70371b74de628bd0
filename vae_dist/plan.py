"""What a run is going to do, in words: shown at its start and by `dry_run=true`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vae_dist.config.checks import divisors
from vae_dist.config.schema import TrainConfig
from vae_dist.data.index import ShardIndex
from vae_dist.data.transforms import ImageSettings
from vae_dist.models.build import build_vae
from vae_dist.runtime import Runtime
from vae_dist.tracking.machine import peak_flops

# float32: weights, gradients, Adam's two moments, averaged weights
BYTES_PER_PARAMETER = 4 * 5


@dataclass(frozen=True)
class Data:
    """What the shards hold. `identity` ties a run to them: it is kept in each checkpoint."""

    train: ShardIndex
    validation: ShardIndex
    settings: ImageSettings  # of training images

    @property
    def image_size(self) -> tuple[int, int]:
        """H, W of every image that the model sees."""
        return self.settings.size

    @property
    def num_dims(self) -> int:
        return math.prod(self.settings.shape)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "image_size": list(self.image_size),
            "train_data": self.train.fingerprint,
            "validation_data": self.validation.fingerprint,
        }


def plan(config: TrainConfig, data: Data, runtime: Runtime, *, first_step: int) -> list[str]:
    """Model, data, steps and machine in a few lines. `config` is resolved."""
    with torch.device("meta"):
        vae = build_vae(config, data.image_size)
    num_parameters = sum(p.numel() for p in vae.parameters())
    height, width = data.image_size
    latent = "x".join(str(size) for size in vae.latent_shape(height, width))
    training = config.training
    epochs = training.steps * training.batch_size / data.train.num_samples
    begin = f"from step {first_step} to {training.steps}" if first_step else f"{training.steps}"
    threads = f" ({torch.get_num_threads()} threads)" if runtime.device.type == "cpu" else ""
    return [
        f"config {config.config}: {num_parameters:,} parameters, {config.likelihood.kind} "
        f"likelihood of {config.data.channels}x{height}x{width} images, {latent} latents",
        f"data {config.data.train}: {data.train.num_samples:,} images in {len(data.train.paths)} "
        f"shards; validation: {data.validation.num_samples:,}",
        f"steps {begin} ({epochs:.1f} epochs) of {training.batch_size} images in "
        f"{config.data.slots} slots, on {runtime.world} x {runtime.device.type}{threads}, "
        f"precision {training.precision}",
    ]


def costs(config: TrainConfig, data: Data, runtime: Runtime) -> list[str]:
    """Memory of one process and the numbers of processes that can share the run."""
    with torch.device("meta"):
        vae = build_vae(config, data.image_size)
    share = config.training.batch_size // runtime.world
    images = min(config.training.microbatch_size or share, share)
    state_bytes = sum(p.numel() for p in vae.parameters()) * BYTES_PER_PARAMETER
    activation_bytes = images * _activation_bytes_per_image(vae, config, data.image_size)
    window_bytes = (
        2 * config.data.window * config.training.batch_size * data.train.mean_sample_bytes
    )
    worlds = ", ".join(str(world) for world in divisors(config.data.slots))
    return [
        f"memory of one process, estimated: weights, gradients, moments and average "
        f"{_megabytes(state_bytes)}, activations of {images} images about "
        f"{_megabytes(activation_bytes)}, undecoded samples "
        f"{_megabytes(window_bytes / runtime.world)} (window {config.data.window})",
        f"numbers of processes that divide data.slots={config.data.slots}: {worlds}",
        "dry run: nothing was trained",
    ]


def peak_images_per_second(config: TrainConfig, data: Data, runtime: Runtime) -> float:
    """Images per second of one device at its peak arithmetic speed, 0.0 where that is not known.

    A backward costs two forwards; what is not a matrix product or a convolution is not counted.
    """
    peak = peak_flops(runtime.device, config.training.precision)
    return peak / (3 * _forward_flops(config, data.image_size)) if peak else 0.0


def _forward_flops(config: TrainConfig, image_size: tuple[int, int]) -> int:
    """Floating point operations of the forward of one image."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae = build_vae(config, image_size)
        vae(
            torch.empty(1, config.data.channels, *image_size),
            torch.empty(1, *vae.latent_shape(*image_size)),
        )
    return int(counter.get_total_flops())


def _activation_bytes_per_image(
    vae: nn.Module, config: TrainConfig, image_size: tuple[int, int]
) -> float:
    """Bytes of the outputs of all layers for one image, which the backward keeps."""
    bytes_per_value = 4 if config.training.precision == "no" else 2
    total = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, torch.Tensor):
            total += output.numel() * bytes_per_value

    leaves = [module for module in vae.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    with torch.device("meta"), torch.no_grad():
        # two: GroupNorm refuses one image of one pixel
        images = torch.empty(2, config.data.channels, *image_size)
        noise = torch.empty(2, *vae.latent_shape(*image_size))  # type: ignore[operator]
        vae(images, noise)
    for hook in hooks:
        hook.remove()
    return total / 2


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
