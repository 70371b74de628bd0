"""Independent Laplace values, a density: the likelihood whose distortion is the absolute error.

    log p = -sum(|x - mean| / b + log 2b),     b = sigma / sqrt(2)

`sigma` is the standard deviation, so that the knobs of the variance, its floor and its logged
figures mean the same as those of `gaussian`: fixed, one learned, one for each channel, or one
decoder output per value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vae_dist.models.likelihoods.gaussian import Density


class Laplace(Density):
    def log_prob_of_values(self, params: Tensor, images: Tensor) -> Tensor:
        mean, log_scale = self._mean_and_log_scale(params)
        return -((images - mean).abs() * torch.exp(-log_scale) + log_scale + math.log(2.0))

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_scale = self._mean_and_log_scale(params)
        # the quantile function of u in (-1/2, 1/2); float32 draws come in steps of 2^-24
        u = torch.rand(mean.shape, generator=generator, device=params.device) - 0.5
        draw = -torch.sign(u) * torch.log1p(-2.0 * u.abs().clamp(max=0.5 - 2.0**-25))
        return (mean + torch.exp(log_scale) * draw).clamp(-1.0, 1.0)

    def _mean_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.moments(params)
        return mean, 0.5 * (log_variance - math.log(2.0))
