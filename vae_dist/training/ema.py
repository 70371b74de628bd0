"""Exponential moving average of the weights: ema <- ema + (1 - decay) (weights - ema)."""

from __future__ import annotations

import copy

import torch
from torch import nn

from vae_dist.sharding import full_value, load_full, local_part, part_like


class Ema:
    """Holds an averaged copy of a module, float32, on the module's device.

    The decay of step k is min(decay, (1 + k) / (10 + k)), so that the average follows early
    training; it is a function of the step, so that a resumed run averages as if never stopped.
    `replica` is a whole module of the same weights, needed where `module` is cut over ranks.
    """

    def __init__(
        self, module: nn.Module, *, decay: float, replica: nn.Module | None = None
    ) -> None:
        self._module = copy.deepcopy(module) if replica is None else replica
        self._module.requires_grad_(False).eval()
        self.decay = decay
        self._sources = dict(module.named_parameters())
        whole = dict(self._module.named_parameters())
        # where the sources are cut, so are the averages; else they are the copy's own weights
        self._averages = {
            name: part_like(whole[name].detach(), source) for name, source in self._sources.items()
        }

    @property
    def module(self) -> nn.Module:
        """The averaged model, whole, for evaluation. Every rank takes part."""
        for name, parameter in self._module.named_parameters():
            average = self._averages[name]
            if local_part(average).data_ptr() != parameter.data_ptr():
                parameter.copy_(full_value(average))
        return self._module

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set the averages to full values."""
        load_full(self._module, tensors)
        for name, average in self._averages.items():
            local_part(average).copy_(local_part(part_like(tensors[name], average)))

    @torch.no_grad()
    def update(self, step: int, *, found_inf: torch.Tensor) -> None:
        """After the update of step `step` (from 0); found_inf = 1 moves nothing."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local_part(average) for average in self._averages.values()]
        sources = [local_part(source).detach() for source in self._sources.values()]
        if found_inf.device.type == "cpu":  # which can be asked without a wait
            if not found_inf:
                torch._foreach_lerp_(averages, sources, 1 - decay)  # one pass instead of three
            return
        difference = torch._foreach_sub(sources, averages)
        torch._foreach_mul_(difference, (1 - decay) * (1 - found_inf))
        torch._foreach_add_(averages, difference)
