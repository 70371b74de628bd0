"""Dense towers, the textbook VAE (Kingma & Welling 2014): for small images of one size.

    encoder: pixels -> linear, relu -> ... -> linear -> moments of q(z|x)
    decoder: z -> linear, relu -> ... -> linear -> parameters of p(x|z)

Hidden layer i of the encoder has width `channels[i]`; the decoder has the same widths backwards.
In and out are those of `conv` with a vector latent; the last layers are float32 outside autocast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.models.blocks import Film, in_float32

Shape = tuple[int, int, int]


class _Layers(nn.Module):
    """Hidden layers of the given widths, the first of which is the input's."""

    def __init__(self, widths: Sequence[int], condition_dims: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.films = nn.ModuleList(
            Film(condition_dims, width) for width in (widths[1:] if condition_dims else ())
        )

    def forward(self, h: Tensor, condition: Tensor | None) -> Tensor:
        for i, layer in enumerate(self.layers):
            h = layer(h)
            if self.films and condition is not None:
                h = self.films[i](h, condition)
            h = F.relu(h)
        return h


class DenseEncoder(nn.Module):
    """Images (B, C, H, W) of `image_shape` -> float32 moments (B, out_channels)."""

    def __init__(
        self, image_shape: Shape, out_channels: int, channels: Sequence[int], condition_dims: int
    ) -> None:
        super().__init__()
        self.hidden = _Layers([math.prod(image_shape), *channels], condition_dims)
        self.linear_out = nn.Linear(channels[-1], out_channels)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        return in_float32(self.linear_out, self.hidden(images.flatten(1), condition))

    @property
    def last_layer(self) -> nn.Linear:
        return self.linear_out


class DenseDecoder(nn.Module):
    """z (B, in_channels) -> float32 parameters of the likelihood, (B, *params_shape)."""

    def __init__(
        self, in_channels: int, params_shape: Shape, channels: Sequence[int], condition_dims: int
    ) -> None:
        super().__init__()
        self.params_shape = params_shape
        self.hidden = _Layers([in_channels, *reversed(channels)], condition_dims)
        self.linear_out = nn.Linear(channels[0], math.prod(params_shape))

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        h = in_float32(self.linear_out, self.hidden(z, condition))
        return h.unflatten(1, self.params_shape)
