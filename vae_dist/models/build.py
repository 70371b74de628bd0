"""From a config to a model: VAE = build_vae(config, (H, W)), with weights that depend on the seed.

The initial weights are a function of `config.seed` alone: every rank and every world size builds
the same model, and the caller's random state is untouched. Under `torch.device("meta")` the model
has shapes and no memory.
"""

from __future__ import annotations

import math

import torch

from vae_dist.config.schema import TrainConfig
from vae_dist.models.conv import Decoder, Encoder
from vae_dist.models.likelihoods import build_likelihood
from vae_dist.models.vae import VAE
from vae_dist.randomness import derive_seed


def build_vae(config: TrainConfig, image_size: tuple[int, int]) -> VAE:
    """The model for images of (H, W) pixels, float32, on the CPU (or meta, if that is the default
    device). With a spatial latent the size binds nothing."""
    model, data = config.model, config.data
    stride = model.patch * 2 ** (len(model.channels) - 1)
    is_spatial = model.latent == "spatial"
    height, width = image_size
    feature_size = None if is_spatial else (math.ceil(height / stride), math.ceil(width / stride))
    device = "meta" if torch.get_default_device().type == "meta" else "cpu"
    with torch.device(device), torch.random.fork_rng(devices=()):
        torch.random.default_generator.manual_seed(derive_seed(config.seed, "init"))
        likelihood = build_likelihood(config.likelihood, data)
        encoder = Encoder(
            data.channels,
            2 * model.latent_channels,
            channels=model.channels,
            blocks=model.blocks,
            norm_groups=model.norm_groups,
            attention=model.attention,
            patch=model.patch,
            feature_size=feature_size,
        )
        decoder = Decoder(
            model.latent_channels,
            likelihood.num_params(data.channels),
            channels=model.channels,
            blocks=model.blocks,
            norm_groups=model.norm_groups,
            attention=model.attention,
            patch=model.patch,
            feature_size=feature_size,
        )
        return VAE(
            encoder,
            decoder,
            likelihood,
            latent_channels=model.latent_channels,
            stride=stride,
            image_size=None if is_spatial else image_size,
        )
