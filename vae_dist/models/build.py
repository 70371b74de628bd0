"""From a config to a model: VAE = build_vae(config, (H, W)), with weights that depend on the seed.

The initial weights are a function of `config.seed` alone: every rank and every world size builds
the same model, and the caller's random state is untouched. Under `torch.device("meta")` the model
has shapes and no memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from operator import floordiv
from typing import Any

import torch
from torch import nn

from vae_dist.config.schema import ModelConfig, TrainConfig
from vae_dist.models.blocks import recompute_in_backward
from vae_dist.models.ladder import LadderDecoder, LadderEncoder, LadderVAE
from vae_dist.models.likelihoods import build_likelihood
from vae_dist.models.towers import Decoder, DenseDecoder, DenseEncoder, Encoder
from vae_dist.models.vae import VAE
from vae_dist.randomness import derive_seed

SMALL_MAP = 2  # positions along a side, of which a 3x3 convolution sees mostly padding


@contextmanager
def initialised(seed: int, purpose: str) -> Iterator[None]:
    """Modules made inside are float32 on the CPU (or meta, if that is the default device), with
    weights that are a function of (seed, purpose)."""
    device = "meta" if torch.get_default_device().type == "meta" else "cpu"
    with torch.device(device), torch.random.fork_rng(devices=()):
        torch.random.default_generator.manual_seed(derive_seed(seed, purpose))
        yield


def build_vae(config: TrainConfig, image_size: tuple[int, int]) -> VAE:
    """The model for images of (H, W) pixels, as `initialised`. With a spatial latent the size binds
    nothing."""
    model, data = config.model, config.data
    sees_mask = data.mask != "none"
    is_ladder = model.arch == "ladder"
    with initialised(config.seed, "init"):
        likelihood = build_likelihood(config.likelihood, data)
        sizes = data.channels + sees_mask, likelihood.num_params
        encoder, decoder = _towers(model, *sizes, image_size)
        vae = (LadderVAE if is_ladder else VAE)(
            encoder,
            decoder,
            likelihood,
            latent_channels=1 if is_ladder else model.latent_channels,
            stride=stride_of(model),
            image_size=None if model.latent == "spatial" else image_size,
            num_classes=model.num_classes,
            sees_mask=sees_mask,
            shortcuts=model.dc_shortcuts or is_ladder,
        )
    if config.objective.alignment:
        vae.projection = build_projection(config)
    if not is_ladder:
        _set_spread(vae, model.initial_sigma)
    if model.gradient_checkpointing:
        recompute_in_backward(vae)
    return vae


def build_projection(config: TrainConfig) -> nn.Conv2d:
    """From z to the features of `objective.alignment`; `alignment_width` is resolved."""
    with initialised(config.seed, "alignment"):
        return nn.Conv2d(config.model.latent_channels, config.objective.alignment_width, 1)


def stride_of(model: ModelConfig) -> int:
    """Pixels of an image along one position of the last feature map."""
    return 1 if model.arch == "dense" else model.patch * math.prod(factors_of(model))


def factors_of(model: ModelConfig) -> list[int]:
    """Sides of the squares that become one position, between each level and the next."""
    return _each(model.factors, len(model.channels) - 1)


def blocks_of_levels(model: ModelConfig) -> list[int]:
    """Residual blocks of each level of the encoder."""
    return _each(model.blocks, len(model.channels))


def _each(value: int | list[int], count: int) -> list[int]:
    return list(value) if isinstance(value, list) else [value] * count


@torch.no_grad()
def _set_spread(vae: VAE, sigma: float) -> None:
    """q(z|x) begins `sigma` times as wide: a term of the last bias, so that no weight differs."""
    encoder: Any = vae.encoder
    last: Any = vae.quant_conv or getattr(encoder, "linear_out", None) or encoder.conv_out
    _, log_variance = last.bias.chunk(2)
    log_variance += 2 * math.log(sigma)


def _towers(
    model: ModelConfig, channels: int, num_params: int, image_size: tuple[int, int]
) -> tuple[Any, Any]:
    """Encoder of images of `channels` channels, decoder to `num_params`."""
    latent, stride = model.latent_channels, stride_of(model)
    if model.arch == "dense":
        return (
            DenseEncoder((channels, *image_size), 2 * latent, model),
            DenseDecoder(latent, (num_params, *image_size), model),
        )
    factors = factors_of(model)
    model = replace(model, factors=factors, blocks=blocks_of_levels(model))
    if model.arch == "ladder":
        sides = accumulate(factors, floordiv, initial=min(image_size) // model.patch)
        kernels = [3 if side > SMALL_MAP else 1 for side in sides]
        return LadderEncoder(channels, model, kernels), LadderDecoder(num_params, model, kernels)
    height, width = (math.ceil(side / stride) for side in image_size)
    size = None if model.latent == "spatial" else (height, width)
    return Encoder(channels, 2 * latent, model, size), Decoder(latent, num_params, model, size)
