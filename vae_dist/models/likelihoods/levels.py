"""What is stored in an image file, and what it is in front of a likelihood.

    bits 5, 8, 16   2^bits levels; 5: files of 8 bits, whose three lowest bits are dropped
    bits 32         float in [-1, 1], as they are: no levels, so a density stays a density

In: stored values, uint8, uint16 or float32. Out: float32 in [-1, 1],

    centers       x = 2 level / (n - 1) - 1     black is -1, white is 1, n levels
    dequantized   x = 2 (level + u) / n - 1     u uniform in [0, 1): a level is a bin of width 2/n

This is the only place that knows how wide a level is, and with `bits_per_dim` the only one that
changes nats into bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
        if self.bits == 5:
            stored = stored >> 3
        return stored.float()

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

    def density_to_level_nats(
        self, nll_nats: float, num_dims: int, *, is_dequantized: bool
    ) -> float:
        """-log density on [-1, 1] -> -log probability of levels, by the width of a level."""
        levels_per_unit = self.num / 2 if is_dequantized else (self.num - 1) / 2
        return nll_nats + num_dims * math.log(levels_per_unit)


def bits_per_dim(nll_nats: float, *, num_dims: int) -> float:
    """-log p of discrete data in nats per image of `num_dims` values -> bits per value."""
    return nll_nats / (num_dims * math.log(2.0))


def uniform_of_content(stored: Tensor) -> Tensor:
    """Uniform noise in [0, 1), float32 of the shape of `stored` (B, C, H, W), that is a function of
    each image alone: the same at every use of an image, in every batch and process.

    A polynomial hash of an image's values, mixed with the place of each value (splitmix64).
    """
    values = stored.flatten(1)
    if values.dtype.is_floating_point:
        values = (values * 32767.0).round()
    values = values.long() + 1  # so that black pixels count
    place = torch.arange(values.shape[1], device=values.device)  # of a value in its image
    image_hash = (values * _mixed(place)).sum(1, keepdim=True)  # (B, 1), modulo 2^64
    mixed = _mixed(_mixed(image_hash) + place)  # (B, D)
    return ((mixed >> 40) & (2**24 - 1)).float().view(stored.shape) / 2.0**24


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, which wraps around as uint64 does."""
    x = x * -7046029254386353131 + 1442695040888963407
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))
