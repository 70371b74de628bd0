"""The normal CDF Phi in log space, with values and gradients that are right in float32.

    log_ndtr                 log Phi(t)
    log_probability_of_bin   log(Phi(c + d) - Phi(c - d))
    clipped_mean             E[min(max(y, -1), 1)],  y ~ N(mean, sigma^2)

A difference of two CDFs loses all digits in the tails, where both are 0 or 1, and in bins that are
narrow against sigma (16 bits), where they are equal. torch.special.log_ndtr has values for the
tail, but its gradient there is the exp of a difference of large numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SQRT2 = math.sqrt(2.0)
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def log_ndtr(t: Tensor) -> Tensor:
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
    """`center` and `half_width` (of one shape) in standard deviations from the mean."""
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
    """-1 + sigma (G((1 - mean)/sigma) - ...): with G(t) = t Phi(t) + phi(t), the integral of Phi,
    E[clip(y)] = 1 - integral of the CDF over [-1, 1]."""
    high, low = (1.0 - mean) / sigma, (-1.0 - mean) / sigma
    return 1.0 - sigma * (_integral_of_cdf(high) - _integral_of_cdf(low))


def _integral_of_cdf(t: Tensor) -> Tensor:
    density = torch.exp(-0.5 * t.square() - LOG_SQRT_2PI)
    return t * torch.special.ndtr(t) + density
