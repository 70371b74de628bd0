"""The latent z: the posterior q(z|x), draws of the prior p(z), moments over a data set.

    q(z|x) = N(mean, diag(exp(log_variance))),   z = mean + exp(log_variance / 2) * noise
    KL(q(z|x) || N(0, I)) = 1/2 sum(mean^2 + exp(log_variance) - 1 - log_variance)
    p(z): z = temperature * e, e ~ N(0, I), or z of a mixture that was fitted to the latents
    (z - shift_factor) * scaling_factor has mean 0 and variance 1 (diffusers' convention)

The posterior is float32, outside autocast: bfloat16 has three digits, and the KL is a difference.
Draw i of the prior is a function of (seed, i) alone, whatever the batch.

Legend: B images, U channels of a spatial latent (dimensions of a vector one), P positions, K draws.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_dist.files import write_durably
from vae_dist.randomness import torch_generator

# exp(20) and exp(-30), and their squares, are finite and normal in float32
MIN_LOG_VARIANCE = -30.0
MAX_LOG_VARIANCE = 20.0
STATISTICS_FILE = "latents.json"  # in a run folder, and beside shards of latents


def bounded(log_variance: Tensor) -> Tensor:
    """Into [MIN_LOG_VARIANCE, MAX_LOG_VARIANCE], smooth and monotone, identity to 1e-4 in
    [-20, 10]."""
    capped = MAX_LOG_VARIANCE - F.softplus(MAX_LOG_VARIANCE - log_variance)
    return MIN_LOG_VARIANCE + F.softplus(capped - MIN_LOG_VARIANCE)


def diagonal_gaussian(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Splits moments (B, 2c, ...) into mean and bounded log-variance, each float32 (B, c, ...)."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean, bounded(log_variance)


def sample_posterior(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """z for standard normal `noise` (B, *latent), or of K draws of each image (B, K, *latent)."""
    if noise.ndim > mean.ndim:
        mean, log_variance = mean.unsqueeze(1), log_variance.unsqueeze(1)
    return mean + torch.exp(0.5 * log_variance) * noise


def kl_per_value(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q || N(0, 1)) in nats of each value of the latent, float32, of the shape of `mean`."""
    mean, log_variance = mean.float(), log_variance.float()
    # expm1 keeps the digits where q is close to the prior and the terms cancel
    return 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance)


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q(z_u|x) || N(0, I)) in nats per image of each unit u, float32 (B, U): a dimension of a
    vector latent, a channel of a spatial one, summed over its positions."""
    kl = kl_per_value(mean, log_variance)
    return kl.flatten(2).sum(2) if kl.ndim > 2 else kl


def log_ratio_to_prior(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log q(z|x) - log p(z) of draws z (B, K, *latent), nats, float32 (B, K); its mean over draws
    of q is the KL."""
    mean, log_variance = mean.float().unsqueeze(1), log_variance.float().unsqueeze(1)
    z = z.float()
    squares = (z - mean).square() * torch.exp(-log_variance)
    return 0.5 * (z.square() - squares - log_variance).flatten(2).sum(2)


class LatentPrior(Protocol):
    """A prior other than N(0, I) for vector latents."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats for latents (N, *latent), float64 (N,)."""

    def sample(self, noise: Tensor, uniform: Tensor, *, temperature: float = 1.0) -> Tensor:
        """z from normal noise (N, *latent) and uniform draws (N,) in [0, 1), float32."""


def drawn_labels(num_classes: int, num_images: int, *, seed: int, first: int = 0) -> Tensor | None:
    """A label for each prior sample of a conditional model, every class as likely as any other;
    None for a model without labels."""
    if not num_classes:
        return None
    generators = (torch_generator(seed, "label", first + i) for i in range(num_images))
    return torch.stack([torch.randint(num_classes, (), generator=g) for g in generators])


class LatentMoments:
    """Float64 sums over images; `sums` may be added to those of other ranks."""

    def __init__(self, num_channels: int, device: torch.device | str = "cpu") -> None:
        # (3, U) of mean, mean squared, variance, flattened; then positions and images
        self.sums = torch.zeros(3 * num_channels + 2, dtype=torch.float64, device=device)

    def add(self, mean: Tensor, log_variance: Tensor | None) -> None:
        """Both (b, U, *positions); without log_variance, z is the mean."""
        mean = mean.flatten(2) if mean.ndim > 2 else mean.unsqueeze(2)  # (b, U, P)
        mean = mean.double()  # first: the variance is a difference of these sums
        within = torch.zeros_like(mean)
        if log_variance is not None:
            within = log_variance.double().exp().reshape(mean.shape)
        per_channel = torch.stack([mean, mean.square(), within]).sum((1, 3))  # (3, U)
        counts = per_channel.new_tensor([mean.shape[0] * mean.shape[2], mean.shape[0]])
        self.sums += torch.cat([per_channel.flatten(), counts])

    def statistics(self) -> dict[str, Any]:
        """Of what was added, at least one image, as `latents.json` holds it."""
        *flat, num_positions, num_images = self.sums.tolist()
        assert num_images > 0
        per_channel = torch.tensor(flat, dtype=torch.float64).view(3, -1) / num_positions
        mean, square, within = per_channel
        variance = (square - mean.square()).clamp(min=0) + within
        shift = float(mean.mean())
        total = float((variance + (mean - shift).square()).mean())
        return {
            "scaling_factor": total**-0.5 if total > 0 else 1.0,
            "shift_factor": shift,
            "per_channel": {"mean": mean.tolist(), "std": variance.sqrt().tolist()},  # (U,)
            "num_images": int(num_images),
        }


def write_statistics(path: Path, statistics: dict[str, Any]) -> None:
    """Write `latents.json`, with facts of which weights and data. Raises OSError."""
    write_durably(path, (json.dumps(statistics, indent=1) + "\n").encode())
