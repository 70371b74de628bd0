"""What a model needs to know of p(x|z), and what stored values are in front of it.

In: `params` (B, num_params, H, W), decoder outputs; images (B, C, H, W), float32 in [-1, 1] as
`prepare` made them. Out: log p(x|z) in nats per image, float32 (B,) (float64 for float64 params).
The arithmetic is float32 under autocast too: params are widened, and no layer is used.

    bits 5, 8, 16   2^bits levels; 5: files of 8 bits, whose three lowest bits are dropped
    bits 32         float in [-1, 1], as they are: no levels, so a density stays a density

    centers         x = 2 level / (n - 1) - 1     black is -1, white is 1, n levels
    dequantized     x = 2 (level + u) / n - 1     u uniform in [0, 1): a level is a bin of width 2/n
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.config.schema import DataConfig, LikelihoodConfig

MAX_LOG_SIZE = 20.0  # of a variance or scale: far above any image's, far below overflow


@dataclass(frozen=True)
class Levels:
    bits: int  # data.bits

    @property
    def are_discrete(self) -> bool:
        return self.bits < 32

    @property
    def num(self) -> int:
        assert self.are_discrete
        return 2**self.bits

    @property
    def half_width(self) -> float:
        """Half the distance between two centers."""
        return 1.0 / (self.num - 1)

    def index(self, stored: Tensor) -> Tensor:
        """Level numbers 0 ... num - 1, float32."""
        return (stored >> 3 if self.bits == 5 else stored).float()

    def centers(self, stored: Tensor) -> Tensor:
        if not self.are_discrete:
            return stored.float()
        return self.index(stored) / ((self.num - 1) / 2) - 1.0

    def dequantized(self, stored: Tensor, uniform: Tensor) -> Tensor:
        return (self.index(stored) + uniform) / (self.num / 2) - 1.0

    def intensity(self, stored: Tensor) -> Tensor:
        """Black 0, white 1, float32."""
        if not self.are_discrete:
            return (stored.float() + 1.0) / 2.0
        return self.index(stored) / float(self.num - 1)

    def nearest(self, values: Tensor) -> Tensor:
        """The centers next to values of any size, those beyond the range included."""
        index = ((values + 1.0) * ((self.num - 1) / 2)).round().clamp(0, self.num - 1)
        return index / ((self.num - 1) / 2) - 1.0

    def at_lowest(self, centers: Tensor) -> Tensor:
        return centers < -1.0 + self.half_width

    def at_highest(self, centers: Tensor) -> Tensor:
        return centers > 1.0 - self.half_width


class Likelihood(nn.Module, ABC):
    needs_uniform = False  # `prepare` draws: it needs uniform noise of the shape of the images
    has_levels = True  # `log_prob` is, or stands for, that of discrete data: bits/dim are defined
    nats_per_value = 0.0  # what -log of a density lacks to that of discrete data

    def __init__(self, config: LikelihoodConfig, data: DataConfig) -> None:
        super().__init__()
        self.levels = Levels(data.bits)
        self.num_params = self.channels = data.channels  # of the decoder, and of images

    def prepare(self, stored: Tensor, uniform: Tensor | None) -> Tensor:
        """Images as they are stored (uint8, uint16 or float32, by data.bits) and uniform noise in
        [0, 1) -> float32 images in [-1, 1]."""
        return self.levels.centers(stored)

    def without_noise(self, stored: Tensor, prepared: Tensor) -> Tensor:
        """The images of `prepare` without the noise of dequantisation, by which a network that
        compares pictures would tell images from means."""
        return prepared

    def noise_free(self, stored: Tensor) -> Tensor:
        """The very images, float32 in [-1, 1], for an encoder whose posterior is the result: not
        dequantised, grey levels binarised at one half."""
        half = torch.full(stored.shape, 0.5, device=stored.device)
        return self.without_noise(stored, self.prepare(stored, half))

    def log_prob(self, params: Tensor, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """log p(x|z) in nats per image, float32 (B,). `mask` (B, 1, H, W) is 1 where a
        pixel was observed: only such pixels count, the others may be anything."""
        params = widened(params)
        if mask is None:
            return self.log_prob_of_values(params, images).flatten(1).sum(1)
        observed = mask > 0
        # before and after: what is missing may be NaN, and 0 * NaN in a gradient is NaN
        images = torch.where(observed, images, 0.0)
        values = self.log_prob_of_values(params, images)
        return torch.where(observed, values, 0.0).flatten(1).sum(1)

    @abstractmethod
    def log_prob_of_values(self, params: Tensor, images: Tensor) -> Tensor:
        """log p of each value (B, C, H, W), or of each pixel (B, 1, H, W) where its channels are
        coupled; params are at least float32."""

    @abstractmethod
    def mean(self, params: Tensor) -> Tensor:
        """E[x|z] in [-1, 1], float32 (B, C, H, W)."""

    @abstractmethod
    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        """One draw of x given z, float32 (B, C, H, W); `generator` is of the device of params."""

    def bits_per_dim(self, nll_nats: float, num_dims: int) -> float | None:
        """-log p of images of `num_dims` values in all, in bits of discrete data per value; None
        without `has_levels`, or without a value (all are missing)."""
        if not self.has_levels or num_dims == 0:
            return None
        return (nll_nats + num_dims * self.nats_per_value) / (num_dims * math.log(2.0))


def widened(params: Tensor) -> Tensor:
    """At least float32: differences of CDFs have no digit left in bfloat16."""
    return params if params.dtype == torch.float64 else params.float()


def above_floor(log_size: Tensor, log_floor: float) -> Tensor:
    """log(floor + exp(log_size)) of a variance or a scale, smooth, finite for any input."""
    capped = MAX_LOG_SIZE - F.softplus(MAX_LOG_SIZE - log_size)
    return log_floor + F.softplus(capped - log_floor)
