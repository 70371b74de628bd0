"""Exponential moving average of the weights: ema <- ema + (1 - decay) (weights - ema)."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """Holds an averaged copy of a module, float32, on the module's device.

    The decay of step k is min(decay, (1 + k) / (10 + k)), so that the average follows early
    training; it is a function of the step, so that a resumed run averages as if never stopped.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay
        self._averages: list[torch.Tensor] = list(self.module.parameters())
        self._sources: list[torch.Tensor] = list(module.parameters())

    @torch.no_grad()
    def update(self, step: int, *, found_inf: torch.Tensor) -> None:
        """After the update of step `step` (from 0); found_inf = 1 moves nothing."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weight = (1 - decay) * (1 - found_inf)
        difference = torch._foreach_sub(self._sources, self._averages)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(self._averages, difference)
