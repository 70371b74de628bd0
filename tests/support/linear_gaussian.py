"""A VAE whose evidence is known in closed form, to hold bounds and estimates against.

    z ~ N(0, I_L),  x | z ~ N(W z + b, s^2 I_D),  so  x ~ N(b, W W' + s^2 I)

The columns of W are orthogonal, so the exact posterior N(S W'(x - b) / s^2, S) has the diagonal
covariance S = (I + W'W / s^2)^-1 and lies in the family of `VAE`: the encoder is linear and exact.
`encoder_error` moves it away: every posterior mean by that many posterior standard deviations,
every log-variance by that number of nats. The gap of the ELBO is then known too.

    toy = linear_gaussian()
    images = toy.images(32)                                   # uint8, as shards would give them
    x = toy.model.likelihood.prepare(images, None)            # float32 in [-1, 1]
    toy.log_evidence(x)                                       # exact log p(x), float64 (B,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from vae_dist.config.schema import DataConfig, LikelihoodConfig
from vae_dist.models.likelihoods import build_likelihood
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator

NUM_LATENTS = 3
IMAGE_SIZE = (3, 4)
SCALES = (
    0.5,
    0.3,
    0.05,
)  # norms of the columns of W: two latents that matter, one that hardly does
SIGMA = 0.15


class LinearEncoder(nn.Module):
    """Images (B, 1, H, W) -> mean and log-variance (B, 2L), linear in the image."""

    def __init__(self, weight: Tensor, bias: Tensor, log_variance: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.log_variance = nn.Parameter(log_variance)

    def forward(self, images: Tensor, *_: Any, **__: Any) -> Tensor:
        mean = images.flatten(1) @ self.weight.T + self.bias
        return torch.cat([mean, self.log_variance.expand_as(mean)], 1)


class LinearDecoder(nn.Module):
    """z (B, L) -> means of p(x|z) (B, 1, H, W)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, z: Tensor, *_: Any, **__: Any) -> Tensor:
        return (z @ self.weight.T + self.bias).unflatten(1, (1, *IMAGE_SIZE))


@dataclass(frozen=True)
class LinearGaussian:
    model: VAE
    weight: Tensor  # W, float64 (D, L)
    bias: Tensor  # b, float64 (D,)
    encoder_error: float

    @property
    def marginal(self) -> MultivariateNormal:
        """p(x), over flattened images."""
        noise = SIGMA**2 * torch.eye(len(self.bias), dtype=torch.float64)
        return MultivariateNormal(self.bias, self.weight @ self.weight.T + noise)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) in nats of prepared images (B, 1, H, W), float64 (B,)."""
        return self.marginal.log_prob(x.double().flatten(1))

    @property
    def elbo_gap_nats(self) -> float:
        """log p(x) - ELBO = KL(q(z|x) || p(z|x)), the same for every x."""
        e = torch.tensor(self.encoder_error, dtype=torch.float64)
        return float(NUM_LATENTS * 0.5 * (e.square() + torch.expm1(e) - e))

    def images(self, num_images: int, *, seed: int = 0) -> Tensor:
        """Draws of p(x) cut to 8 bits, uint8 (N, 1, H, W)."""
        generator = torch_generator(seed, "linear-gaussian")
        z = torch.randn(num_images, NUM_LATENTS, dtype=torch.float64, generator=generator)
        noise = torch.randn(num_images, len(self.bias), dtype=torch.float64, generator=generator)
        x = z @ self.weight.T + self.bias + SIGMA * noise
        levels = (127.5 * (x + 1)).round().clamp(0, 255)
        return levels.to(torch.uint8).unflatten(1, (1, *IMAGE_SIZE))


def linear_gaussian(*, encoder_error: float = 0.0, seed: int = 0) -> LinearGaussian:
    generator = torch_generator(seed, "linear-gaussian-weights")
    num_dims = IMAGE_SIZE[0] * IMAGE_SIZE[1]
    random = torch.randn(num_dims, NUM_LATENTS, dtype=torch.float64, generator=generator)
    weight = torch.linalg.qr(random)[0] * torch.tensor(SCALES, dtype=torch.float64)  # (D, L)
    bias = 0.1 * torch.randn(num_dims, dtype=torch.float64, generator=generator)
    variance = 1 / (1 + weight.square().sum(0) / SIGMA**2)  # S, the exact posterior's
    to_mean = variance.unsqueeze(1) * weight.T / SIGMA**2  # (L, D)
    offset = -to_mean @ bias + encoder_error * variance.sqrt()
    likelihood = build_likelihood(
        LikelihoodConfig(kind="gaussian", variance="fixed", sigma=SIGMA),
        DataConfig(channels=1, dequantize=False),
    )
    model = VAE(
        LinearEncoder(to_mean.float(), offset.float(), (variance.log() + encoder_error).float()),  # type: ignore[arg-type]
        LinearDecoder(weight.float(), bias.float()),  # type: ignore[arg-type]
        likelihood,
        latent_channels=NUM_LATENTS,
        stride=1,
        image_size=IMAGE_SIZE,
    )
    return LinearGaussian(model, weight, bias, encoder_error)
