"""The VAE: towers, posterior and likelihood behind one forward.

    images (B, C, H, W) in [-1, 1], noise (B, *latent_shape) ~ N(0, I)
    -> log p(x|z) and KL(q(z|x) || p(z)) in nats per image, z = mean + sigma * noise

    ELBO = log_likelihood - kl.sum(1)

Noise is an argument, so that a run's draws are a function of (seed, step, slot) and a compiled
graph stays pure. Sizes that the stride f does not divide are padded by replication on the right and
bottom; the decoder's outputs are cropped back before the likelihood sees them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.models import posterior
from vae_dist.models.conv import Decoder, Encoder, in_float32
from vae_dist.models.likelihoods import Likelihood


class VAEOutput(NamedTuple):
    """Plain tensors, float32, so a pytree for DDP, FSDP and compile."""

    log_likelihood: Tensor  # (B,) log p(x|z), nats per image
    kl: Tensor  # (B, groups) KL(q || p) of each group of latents, nats per image; one group
    mean: Tensor  # (B, *latent_shape) of q(z|x)
    log_variance: Tensor  # (B, *latent_shape) of q(z|x), bounded
    params: Tensor  # (B, likelihood.num_params(C), H, W) decoder outputs
    reconstruction: Tensor  # (B, C, H, W) E[x|z], in [-1, 1]


class VAE(nn.Module):
    """`encoder` and `decoder` agree on the latent; `quant_conv` and `post_quant_conv` are the 1x1
    layers around a spatial latent, None for a vector one. `image_size` is the (H, W) that a vector
    latent is bound to, None where any size will do."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        likelihood: Likelihood,
        *,
        latent_channels: int,
        stride: int,
        image_size: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self.latent_channels = latent_channels
        self.stride = stride
        self.image_size = image_size
        is_spatial = image_size is None
        self.quant_conv = (
            nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if is_spatial else None
        )
        self.post_quant_conv = (
            nn.Conv2d(latent_channels, latent_channels, 1) if is_spatial else None
        )

    def forward(self, images: Tensor, noise: Tensor) -> VAEOutput:
        mean, log_variance = self.encode(images)
        z = posterior.sample(mean, log_variance, noise)
        height, width = images.shape[-2:]
        params = self.decode(z, (height, width))
        kl = posterior.kl_to_standard_normal(mean, log_variance)
        return VAEOutput(
            log_likelihood=self.likelihood.log_prob(params, images),
            kl=kl.unsqueeze(1),
            mean=mean,
            log_variance=log_variance,
            params=params,
            reconstruction=self.likelihood.mean(params),
        )

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each float32 (B, *latent_shape)."""
        height, width = images.shape[-2:]
        self._check_size(height, width)
        bottom, right = -height % self.stride, -width % self.stride
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom), mode="replicate")
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = in_float32(self.quant_conv, moments)
        return posterior.diagonal_gaussian(moments)

    def decode(self, z: Tensor, image_size: tuple[int, int]) -> Tensor:
        """z (B, *latent_shape) -> float32 parameters of p(x|z) for images of size (H, W)."""
        height, width = image_size
        self._check_size(height, width)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        params: Tensor = self.decoder(z)
        return params[:, :, :height, :width]

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one image's latent, for images of height x width pixels."""
        self._check_size(height, width)
        if self.image_size is not None:
            return (self.latent_channels,)
        return (
            self.latent_channels,
            math.ceil(height / self.stride),
            math.ceil(width / self.stride),
        )

    def _check_size(self, height: int, width: int) -> None:
        if self.image_size is not None and (height, width) != self.image_size:
            raise ValueError(
                f"images of {height}x{width} pixels, but a model with model.latent=vector works at "
                f"the {self.image_size[0]}x{self.image_size[1]} that it was built for; train with "
                "model.latent=spatial to use other sizes"
            )
