"""Sums of importance weights w that come in parts, as logarithms of any size, in float64.

    log sum w,   (sum w)^2 / sum w^2

Sums are of w / exp(largest log w so far), which can neither overflow nor vanish.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    weights: Tensor  # (*shape, s), over exp(shift): at most 1
    shrink: Tensor  # (*shape): what earlier sums are multiplied by to be over exp(shift) too


class StreamedWeights:
    """log sum w and the effective sample size."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        self._largest = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        self.sum = torch.zeros(shape, dtype=torch.float64, device=device)  # over exp(shift)
        self._squares = torch.zeros_like(self.sum)

    def add(self, log_weights: Tensor) -> Part:
        """log_weights (*shape, s)."""
        log_weights = log_weights.double()
        largest = torch.maximum(self._largest, log_weights.amax(-1))
        # Where all weights so far are 0 any shift will do, but -inf - -inf is no number.
        shift = torch.where(largest == -torch.inf, 0.0, largest)
        part = Part((log_weights - shift.unsqueeze(-1)).exp(), (self._largest - shift).exp())
        self.sum = self.sum * part.shrink + part.weights.sum(-1)
        self._squares = self._squares * part.shrink.square() + part.weights.square().sum(-1)
        self._largest = largest
        return part

    @property
    def log_sum(self) -> Tensor:
        return self._largest + self.sum.log()

    @property
    def effective_samples(self) -> Tensor:
        """(sum w)^2 / sum w^2; 0 where all weights are."""
        return torch.where(self.sum > 0, self.sum.square() / self._squares, 0.0)
