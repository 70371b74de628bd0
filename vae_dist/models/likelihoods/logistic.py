"""A mixture of K discretised logistic distributions for each pixel (Salimans et al. 2017).

    p(x) = sum_k pi_k prod_c P_k,c(x_c | x_1 ... x_c-1)
    P_k,c = F((x_c + h - m)/s) - F((x_c - h - m)/s),     F the logistic function, h half a level
    m     = mean_k,c + sum_j<c tanh(a_k,c,j) x_j

The channels of a pixel share the component k, and later ones follow earlier ones linearly, in
PixelCNN++ for three channels and here for any number; the bins of the lowest and highest level are
open to infinity. In log space a bin has no cancellation: with a < b its edges in units of s,

    F(b) - F(a) = F(b) F(-a) (1 - exp(a - b))

Decoder outputs: K logits, then K C means, K C log-scales, K C (C - 1)/2 couplings. The scale has
the smooth floor whose standard deviation, s pi / sqrt 3, is likelihood.min_sigma.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_dist.config.schema import DataConfig, LikelihoodConfig
from vae_dist.models.likelihoods.base import Likelihood, above_floor, widened

# What decoder outputs of 0 stand for: components spread evenly over the greys, each this wide.
INITIAL_LOG_SCALE = math.log(0.25)


class DiscretizedLogisticMixture(Likelihood):
    """Images are centers of levels. `mean` is the mean over components of logistic variables
    clipped to [-1, 1], channel after channel, each given the means of those before it: that of x
    but for rounding and for clipping that couples. `sample` is exact: each channel is rounded to a
    level before the next one sees it."""

    def __init__(self, config: LikelihoodConfig, data: DataConfig) -> None:
        super().__init__(config, data)
        self.num_components = config.mixtures
        self.num_couplings = self.channels * (self.channels - 1) // 2
        self.num_params = config.mixtures * (1 + 2 * self.channels + self.num_couplings)
        self.floor_log_scale = math.log(config.min_sigma * math.sqrt(3.0) / math.pi)

    def log_prob_of_values(self, params: Tensor, images: Tensor) -> Tensor:
        logits, means, log_scales, couplings = self._components(params)
        values = images.unsqueeze(1).unbind(2)  # C times (B, 1, H, W)
        means = torch.stack(
            [_given(means, couplings, values[:channel]) for channel in range(self.channels)], 2
        )  # (B, K, C, H, W)
        x = images.unsqueeze(1)
        precision = torch.exp(-log_scales)
        center, half_width = (x - means) * precision, self.levels.half_width * precision
        below_top = F.logsigmoid(half_width + center)  # log F(b)
        above_bottom = F.logsigmoid(half_width - center)  # log F(-a)
        width = torch.log(-torch.expm1(-2 * half_width))
        log_bin = torch.where(
            self.levels.at_lowest(x),
            below_top,
            torch.where(self.levels.at_highest(x), above_bottom, below_top + above_bottom + width),
        )
        log_joint = torch.log_softmax(logits, 1) + log_bin.sum(2)  # (B, K, H, W)
        return torch.logsumexp(log_joint, 1, keepdim=True)

    def mean(self, params: Tensor) -> Tensor:
        logits, means, log_scales, couplings = self._components(widened(params))
        values: list[Tensor] = []
        for channel in range(self.channels):
            location = _given(means, couplings, values)
            scale = torch.exp(log_scales[:, :, channel])
            # E[clip(y)] = 1 - integral of the CDF over [-1, 1]; softplus is the integral of F
            area = F.softplus((1.0 - location) / scale) - F.softplus((-1.0 - location) / scale)
            values.append(1.0 - scale * area)
        weights = torch.softmax(logits, 1).unsqueeze(2)
        return (weights * torch.stack(values, 2)).sum(1)

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        logits, means, log_scales, couplings = self._components(widened(params))
        gumbel = -torch.log(-torch.log(_uniform(logits, generator)))
        chosen = (logits + gumbel).argmax(1, keepdim=True).unsqueeze(2)  # (B, 1, 1, H, W)
        means, log_scales, couplings = (
            part.take_along_dim(chosen, 1) for part in (means, log_scales, couplings)
        )
        values: list[Tensor] = []
        for channel in range(self.channels):
            location = _given(means, couplings, values)
            noise = torch.logit(_uniform(location, generator))
            values.append(
                self.levels.nearest(location + torch.exp(log_scales[:, :, channel]) * noise)
            )
        return torch.stack(values, 2).squeeze(1)

    def _components(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (B, K, H, W), means and log-scales (B, K, C, H, W), couplings
        (B, K, C (C - 1)/2, H, W)."""
        count, channels = self.num_components, self.channels
        per_component = params[:, count:].unflatten(1, (count, -1))
        means, raw, couplings = per_component.split((channels, channels, self.num_couplings), 2)
        edge = 1.0 - 1.0 / count
        spread = torch.linspace(-edge, edge, count, dtype=params.dtype, device=params.device)
        log_scales = above_floor(raw + INITIAL_LOG_SCALE, self.floor_log_scale)
        means = means + spread.view(1, -1, 1, 1, 1)
        return params[:, :count], means, log_scales, torch.tanh(couplings)


def _given(means: Tensor, couplings: Tensor, earlier: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Locations of the channel that follows `earlier` ones, each (B, K or 1, H, W)."""
    channel = len(earlier)
    first = channel * (channel - 1) // 2
    location = means[:, :, channel]
    for j, value in enumerate(earlier):
        location = location + couplings[:, :, first + j] * value
    return location


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """In (0, 1), float32: neither end, whose logarithms are infinite."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device)
    return uniform.clamp(2.0**-25, 1.0 - 2.0**-24)
