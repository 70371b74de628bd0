"""Feature-wise scale and shift of activations by a condition (FiLM, Perez et al. 2018).

In: feature maps (B, C, H, W), or hidden layers (B, C), and a condition (B, E), for example the
embedding of a label.

    out = (1 + scale) * x + shift,   [scale, shift] = condition W' + b     per channel

W and b start at zero: before training it is the identity. Nothing is drawn, so a conditional model
begins with the weights of the unconditional one of its seed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Film(nn.Module):
    def __init__(self, condition_dims: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * channels, condition_dims))
        self.bias = nn.Parameter(torch.zeros(2 * channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        moved: Tensor = F.linear(condition, self.weight, self.bias)
        scale, shift = moved.view(*moved.shape, *[1] * (x.ndim - 2)).chunk(2, dim=1)
        return (1 + scale) * x + shift
