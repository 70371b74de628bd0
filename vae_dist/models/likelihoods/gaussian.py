"""Independent values with a mean and a variance: two densities, and probabilities of levels.

    gaussian               log p = -1/2 sum((x - mean)^2 / v + log v + log 2 pi),     v = sigma^2
    laplace                log p = -sum(|x - mean| / b + log 2b),     b = sigma / sqrt(2)
    discretized_gaussian   log p = sum log(Phi((x + h - mean)/sigma) - Phi((x - h - mean)/sigma))

with h half a level, and the bins of the lowest and the highest level open to infinity. The variance
is `fixed`, or v = min_sigma^2 + exp(raw) with one learned `raw` (`shared`), one for each channel
(`per_channel`) or one decoder output per value (`per_pixel`): a smooth floor.

A difference of two CDFs Phi loses all digits in the tails, where both are 0 or 1, and in bins that
are narrow against sigma (16 bits), where they are equal. torch.special.log_ndtr has values for the
tail, but its gradient there is the exp of a difference of large numbers. Hence the functions at the
end, with values and gradients that are right in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vae_dist.config.schema import DataConfig, LikelihoodConfig
from vae_dist.models.likelihoods.base import Likelihood, above_floor, widened

Moments = tuple[Tensor, Tensor]

SQRT2 = math.sqrt(2.0)
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)

INITIAL_LOG_VARIANCE = 2 * math.log(0.5)  # of a decoder output of 0: fits untrained means
# Adam moves a parameter by about lr per step; log-variance has several nats to go
LOG_VARIANCE_GAIN = 10.0


class NormalMoments(nn.Module):
    """Decoder outputs -> mean (B, C, H, W) and log-variance that broadcasts to it."""

    def __init__(self, config: LikelihoodConfig, *, channels: int) -> None:
        super().__init__()
        self.variance = config.variance
        self.fixed_log_variance = 2 * math.log(config.sigma)
        self.floor_log_variance = 2 * math.log(config.min_sigma)
        if self.variance == "shared":
            self.raw_log_variance = nn.Parameter(torch.zeros(1))  # FSDP shards no 0-dim one
        elif self.variance == "per_channel":
            self.raw_log_variance = nn.Parameter(torch.zeros(channels))

    def forward(self, params: Tensor) -> Moments:
        params = widened(params)
        if self.variance == "fixed":
            return params, params.new_full((), self.fixed_log_variance)
        if self.variance == "per_pixel":
            mean, raw = params.chunk(2, dim=1)
        else:
            mean, raw = params, (self.raw_log_variance * LOG_VARIANCE_GAIN).view(1, -1, 1, 1)
        return mean, above_floor(raw + INITIAL_LOG_VARIANCE, self.floor_log_variance)


class _OfMoments(Likelihood):
    def __init__(self, config: LikelihoodConfig, data: DataConfig) -> None:
        super().__init__(config, data)
        self.moments = NormalMoments(config, channels=data.channels)
        if config.variance == "per_pixel":  # means, then log-variances
            self.num_params *= 2

    def _normal_draw(self, params: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_variance = self.moments(params)
        noise = torch.randn(mean.shape, generator=generator, device=params.device)
        return mean + torch.exp(0.5 * log_variance) * noise


class _Density(_OfMoments):
    """A density on [-1, 1]: of dequantised levels, of their centers, or of float images."""

    def __init__(self, config: LikelihoodConfig, data: DataConfig) -> None:
        super().__init__(config, data)
        self.has_levels = self.levels.are_discrete
        self.needs_uniform = data.dequantize and self.has_levels
        if self.has_levels:
            # of as many levels as the density has in an interval of length 1
            num = self.levels.num
            self.nats_per_value = math.log(num / 2 if self.needs_uniform else (num - 1) / 2)

    def prepare(self, stored: Tensor, uniform: Tensor | None) -> Tensor:
        if not self.needs_uniform:
            return self.levels.centers(stored)
        assert uniform is not None
        return self.levels.dequantized(stored, uniform)

    def without_noise(self, stored: Tensor, prepared: Tensor) -> Tensor:
        return self.levels.centers(stored)

    def mean(self, params: Tensor) -> Tensor:
        mean: Tensor = self.moments(params)[0]
        return mean.clamp(-1.0, 1.0)


class Gaussian(_Density):
    def log_prob_of_values(self, params: Tensor, images: Tensor) -> Tensor:
        mean, log_variance = self.moments(params)
        squares = (images - mean).square() * torch.exp(-log_variance)
        return -0.5 * (squares + log_variance + math.log(2 * math.pi))

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        return self._normal_draw(params, generator).clamp(-1.0, 1.0)


class Laplace(_Density):
    """`sigma` is the standard deviation here too."""

    def log_prob_of_values(self, params: Tensor, images: Tensor) -> Tensor:
        mean, log_scale = self._mean_and_log_scale(params)
        return -((images - mean).abs() * torch.exp(-log_scale) + log_scale + math.log(2.0))

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_scale = self._mean_and_log_scale(params)
        # the quantile function of u in (-1/2, 1/2); float32 draws come in steps of 2^-24
        u = torch.rand(mean.shape, generator=generator, device=params.device) - 0.5
        draw = -torch.sign(u) * torch.log1p(-2.0 * u.abs().clamp(max=0.5 - 2.0**-25))
        return (mean + torch.exp(log_scale) * draw).clamp(-1.0, 1.0)

    def _mean_and_log_scale(self, params: Tensor) -> Moments:
        mean, log_variance = self.moments(params)
        return mean, 0.5 * (log_variance - math.log(2.0))


class DiscretizedGaussian(_OfMoments):
    """Images are centers of levels; `mean` is that of the normal variable clipped to [-1, 1], that
    of the levels to less than a level."""

    def log_prob_of_values(self, params: Tensor, images: Tensor) -> Tensor:
        mean, log_variance = self.moments(params)
        precision = torch.exp(-0.5 * log_variance)
        center = (images - mean) * precision
        half_width = (self.levels.half_width * precision).expand_as(center)
        inside = log_probability_of_bin(center, half_width)
        is_lowest, is_highest = self.levels.at_lowest(images), self.levels.at_highest(images)
        outward = log_ndtr(half_width + torch.where(is_lowest, center, -center))
        return torch.where(is_lowest | is_highest, outward, inside)

    def mean(self, params: Tensor) -> Tensor:
        mean, log_variance = self.moments(params)
        return clipped_mean(mean, torch.exp(0.5 * log_variance))

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        return self.levels.nearest(self._normal_draw(params, generator))


# the normal distribution function Phi in log space


def log_ndtr(t: Tensor) -> Tensor:
    """log Phi(t)."""
    is_tail = t < -1.0
    tail = torch.where(is_tail, t, -1.0)
    body = torch.where(is_tail, 0.0, t)
    # erfcx(x) = exp(x^2) erfc(x) is of order 1/x in the tail
    return torch.where(
        is_tail,
        torch.log(0.5 * torch.special.erfcx(-tail / SQRT2)) - 0.5 * tail.square(),
        torch.log1p(-0.5 * torch.erfc(body / SQRT2)),
    )


def log_probability_of_bin(center: Tensor, half_width: Tensor) -> Tensor:
    """log(Phi(c + d) - Phi(c - d)), `center` c and `half_width` d (of one shape) in standard
    deviations from the mean."""
    center = center.abs()
    near = center - half_width  # the edge that is closer to the mean
    is_narrow = (center * half_width).square() + half_width.square() < 0.1
    is_tail = ~is_narrow & (near > 1.0)
    is_body = ~is_narrow & ~is_tail
    # each formula is evaluated where it holds, elsewhere at a harmless point: where() hands a
    # gradient of 0 to what it does not take, and 0 * inf is NaN
    narrow = _narrow(torch.where(is_narrow, center, 0.0), torch.where(is_narrow, half_width, 0.1))
    tail = _tail(torch.where(is_tail, center, 3.0), torch.where(is_tail, half_width, 1.0))
    body = _body(torch.where(is_body, center, 0.0), torch.where(is_body, half_width, 1.0))
    return torch.where(is_narrow, narrow, torch.where(is_tail, tail, body))


def _narrow(c: Tensor, d: Tensor) -> Tensor:
    """Density at the center times the width, with the terms of the integral's series that count:
    the next one is below 1e-6 where (c d)^2 + d^2 < 0.1."""
    k2, d2 = (c * d).square(), d.square()
    series = (k2 - d2) / 6 - k2.square() / 180 - k2 * d2 / 45 + d2.square() / 90
    return torch.log(2 * d) - 0.5 * c.square() - LOG_SQRT_2PI + series


def _tail(c: Tensor, d: Tensor) -> Tensor:
    near, far = c - d, c + d
    # far^2 - near^2 = 4 c d
    difference = torch.special.erfcx(near / SQRT2) - torch.exp(-2 * c * d) * torch.special.erfcx(
        far / SQRT2
    )
    return torch.log(0.5 * difference) - 0.5 * near.square()


def _body(c: Tensor, d: Tensor) -> Tensor:
    return torch.log(0.5 * (torch.erf((c + d) / SQRT2) - torch.erf((c - d) / SQRT2)))


def clipped_mean(mean: Tensor, sigma: Tensor) -> Tensor:
    """E[min(max(y, -1), 1)] of y ~ N(mean, sigma^2): 1 - integral of its CDF over [-1, 1], with
    t Phi(t) + phi(t) the integral of Phi."""
    high, low = (1.0 - mean) / sigma, (-1.0 - mean) / sigma
    return 1.0 - sigma * (_integral_of_cdf(high) - _integral_of_cdf(low))


def _integral_of_cdf(t: Tensor) -> Tensor:
    density = torch.exp(-0.5 * t.square() - LOG_SQRT_2PI)
    return t * torch.special.ndtr(t) + density
