"""The likelihoods p(x|z): how decoder outputs become a distribution over images.

In: `params` (B, num_params, H, W), float32 decoder outputs; images (B, C, H, W), float32 in [-1, 1]
as `prepare` made them from uint8. Out: log p(x|z) in nats per image, float32 (B,).

    Bernoulli   images are -1 or +1:  log p = sum log sigmoid(image * logit)
    Gaussian    log p = -1/2 sum((image - mean)^2 / v + log v + log 2 pi),   v = sigma^2

The variance v of a Gaussian is `fixed`, or v = min_sigma^2 + exp(raw) with one learned `raw`
(`shared`) or one decoder output per value (`per_pixel`): a smooth floor, as if noise of min_sigma
were added. A density on [-1, 1] becomes a probability of 8-bit levels by the change of variables:
one level is 1/128 wide (dequantised: x = (level + u)/128 - 1) or 1/127.5 wide.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.config.schema import DataConfig, LikelihoodConfig

# Log-variance that a decoder output of 0 stands for: sigma = 1/2 fits images before training.
INITIAL_LOG_VARIANCE = 2 * math.log(0.5)
# Adam moves every parameter by about lr per step, whatever its gradient; log-variance has several
# nats to go, which would take a single scalar 10,000 steps and more.
SHARED_LOG_VARIANCE_GAIN = 10.0


class Likelihood(nn.Module, ABC):
    """What a model needs to know of p(x|z)."""

    needs_uniform: bool
    """Whether `prepare` draws: it then needs uniform noise of the shape of the images."""

    @abstractmethod
    def num_params(self, channels: int) -> int:
        """Decoder channels for images of `channels` channels."""

    @abstractmethod
    def prepare(self, images_u8: Tensor, uniform: Tensor | None) -> Tensor:
        """uint8 images and uniform noise in [0, 1) -> float32 images in [-1, 1]."""

    @abstractmethod
    def log_prob(self, params: Tensor, images: Tensor) -> Tensor:
        """log p(x|z) in nats per image, float32 (B,)."""

    @abstractmethod
    def mean(self, params: Tensor) -> Tensor:
        """E[x|z] in [-1, 1], float32 (B, C, H, W)."""

    @abstractmethod
    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        """One draw of x given z, float32 (B, C, H, W); `generator` is of the device of params."""

    @abstractmethod
    def nats_to_level_nats(self, nll_nats: float, num_dims: int) -> float:
        """-log p in nats per image of `num_dims` values -> that of the discrete data it stands
        for."""

    def at_floor_fraction(self, params: Tensor) -> Tensor | None:
        """Part of each image's values whose variance is floor more than signal, float32 (B,); None
        where no variance is learned."""
        return None


class Bernoulli(Likelihood):
    """Grey images, binarised at random: +1 with probability level/255, else -1. `params` are
    logits."""

    needs_uniform = True

    def num_params(self, channels: int) -> int:
        return channels

    def prepare(self, images_u8: Tensor, uniform: Tensor | None) -> Tensor:
        if uniform is None:
            raise ValueError("a Bernoulli likelihood binarises with uniform noise: pass uniform=")
        return torch.where(uniform < images_u8.float() / 255.0, 1.0, -1.0)

    def log_prob(self, params: Tensor, images: Tensor) -> Tensor:
        return F.logsigmoid(images * params.float()).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return torch.tanh(0.5 * params.float())  # 2 sigmoid(logit) - 1

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(params.shape, generator=generator, device=params.device)
        return torch.where(uniform < torch.sigmoid(params.float()), 1.0, -1.0)

    def nats_to_level_nats(self, nll_nats: float, num_dims: int) -> float:
        return nll_nats


class Gaussian(Likelihood):
    """Independent normal values; `params` are means, then raw log-variances if per_pixel."""

    def __init__(self, config: LikelihoodConfig, *, dequantize: bool) -> None:
        super().__init__()
        self.variance = config.variance
        self.needs_uniform = dequantize
        self.fixed_log_variance = 2 * math.log(config.sigma)
        self.floor_log_variance = 2 * math.log(config.min_sigma)
        if self.variance == "shared":
            self.raw_log_variance = nn.Parameter(torch.zeros(1))  # FSDP shards no 0-dim one

    def num_params(self, channels: int) -> int:
        return 2 * channels if self.variance == "per_pixel" else channels

    def prepare(self, images_u8: Tensor, uniform: Tensor | None) -> Tensor:
        if not self.needs_uniform:
            return images_u8.float() / 127.5 - 1.0
        if uniform is None:
            raise ValueError("data.dequantize=true adds uniform noise: pass uniform=")
        return (images_u8.float() + uniform) / 128.0 - 1.0

    def log_prob(self, params: Tensor, images: Tensor) -> Tensor:
        mean, log_variance = self.moments(params)
        squares = (images - mean).square() * torch.exp(-log_variance)
        log_density = -0.5 * (squares + log_variance + math.log(2 * math.pi))
        return log_density.flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return self.moments(params)[0].clamp(-1.0, 1.0)

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_variance = self.moments(params)
        noise = torch.randn(mean.shape, generator=generator, device=params.device)
        return (mean + torch.exp(0.5 * log_variance) * noise).clamp(-1.0, 1.0)

    def nats_to_level_nats(self, nll_nats: float, num_dims: int) -> float:
        levels_per_unit = 128.0 if self.needs_uniform else 127.5
        return nll_nats + num_dims * math.log(levels_per_unit)

    def at_floor_fraction(self, params: Tensor) -> Tensor | None:
        raw = self._raw_log_variance(params)
        if raw is None:
            return None
        at_floor = (raw < self.floor_log_variance).float()
        return at_floor.expand_as(self.moments(params)[0]).flatten(1).mean(1)

    def moments(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and log-variance, of that shape or a scalar, float32."""
        params = params.float()
        mean = params.chunk(2, dim=1)[0] if self.variance == "per_pixel" else params
        raw = self._raw_log_variance(params)
        if raw is None:
            return mean, mean.new_tensor(self.fixed_log_variance)
        # log(min_sigma^2 + exp(raw)), without overflow
        return mean, self.floor_log_variance + F.softplus(raw - self.floor_log_variance)

    def _raw_log_variance(self, params: Tensor) -> Tensor | None:
        if self.variance == "per_pixel":
            return params.float().chunk(2, dim=1)[1] + INITIAL_LOG_VARIANCE
        if self.variance == "shared":
            return self.raw_log_variance * SHARED_LOG_VARIANCE_GAIN + INITIAL_LOG_VARIANCE
        return None


def build_likelihood(config: LikelihoodConfig, data: DataConfig) -> Likelihood:
    if config.kind == "bernoulli":
        return Bernoulli()
    return Gaussian(config, dequantize=data.dequantize)


def bits_per_dim(nll_nats: float, *, num_dims: int) -> float:
    """-log p of discrete data in nats per image of `num_dims` values -> bits per value."""
    return nll_nats / (num_dims * math.log(2.0))
