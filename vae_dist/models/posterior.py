"""The approximate posterior q(z|x) = N(mean, diag(exp(log_variance))) and its distance to N(0, I).

    z  = mean + exp(log_variance / 2) * noise,   noise ~ N(0, I)
    KL = 1/2 sum(mean^2 + exp(log_variance) - 1 - log_variance)     nats per image

Everything here is float32, outside autocast: bfloat16 has three digits, the KL is a difference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# exp(20) and exp(-30), and their squares, are finite and normal in float32. The bounds lie 10 past
# the range in which `bounded` is the identity, because softplus needs that room: e^-10 < 1e-4.
MIN_LOG_VARIANCE = -30.0
MAX_LOG_VARIANCE = 20.0


def bounded(log_variance: Tensor) -> Tensor:
    """Into [MIN_LOG_VARIANCE, MAX_LOG_VARIANCE], smooth and monotone, identity to 1e-4 in
    [-20, 10]."""
    capped = MAX_LOG_VARIANCE - F.softplus(MAX_LOG_VARIANCE - log_variance)
    return MIN_LOG_VARIANCE + F.softplus(capped - MIN_LOG_VARIANCE)


def diagonal_gaussian(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Splits moments (B, 2c, ...) into mean and bounded log-variance, each float32 (B, c, ...)."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean, bounded(log_variance)


def sample(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """z for standard normal `noise` of the shape of `mean`."""
    return mean + torch.exp(0.5 * log_variance) * noise


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q(z_u|x) || N(0, I)) in nats per image of each unit u, float32 (B, U): a dimension of a
    vector latent, a channel of a spatial one, summed over its positions."""
    mean, log_variance = mean.float(), log_variance.float()
    # expm1 keeps the digits where q is close to the prior and the terms cancel.
    kl = 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance)
    return kl.flatten(2).sum(2) if kl.ndim > 2 else kl


def log_ratio_to_prior(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log q(z|x) - log p(z) of draws z (B, K, *latent), nats, float32 (B, K); its mean over draws
    of q is the KL."""
    mean, log_variance = mean.float().unsqueeze(1), log_variance.float().unsqueeze(1)
    z = z.float()
    squares = (z - mean).square() * torch.exp(-log_variance)
    return 0.5 * (z.square() - squares - log_variance).flatten(2).sum(2)
