"""The blocks of both towers: residual block, self-attention, down, up.

In and out: feature maps (B, C, H, W). Names and shapes of the parameters are those of diffusers'
`AutoencoderKL`, so that a spatial model exports to it key by key.

    residual:   h = x' + conv2(silu(norm2(conv1(silu(norm1(x))))))     x' = x or conv_shortcut(x)
                with a condition, norm2 is followed by its scale and shift (`Film`)
    attention:  h = x + to_out(softmax(q k^T / sqrt(C)) v)             one head over all positions

The last layer of each sum starts at zero (Zhang et al. 2019, "Fixup Initialization"). Changes of
resolution may have a shortcut without parameters beside their convolution, which then starts at
zero too (DC-AE, Chen et al. 2024, arXiv 2410.10733):

    down:  2x2 positions to channels, means of neighbouring channels     (C, H, W) -> (D, H/2, W/2)
    up:    copies of channels, channels to 2x2 positions                 (D, H, W) -> (C, 2H, 2W)

Every block can give up its inner activations and compute them again in the backward (gradient
checkpointing): the same numbers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LABEL_DIMS = 64  # of the embedding that the blocks' scales and shifts are linear in
NORM_EPS = 1e-6
SMALLEST_MAP = 64  # pixels; of fewer, `convolution_of_doubled` costs more than it saves


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(num_groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=NORM_EPS)


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) in float32, whatever autocast says around it."""
    if x.device.type == "meta":  # which has no autocast
        return layer(x.float())
    with torch.autocast(device_type=x.device.type, enabled=False):
        h: Tensor = layer(x.float())
        return h


def averaged(x: Tensor, channels: int) -> Tensor:
    """(B, C, H, W) -> (B, channels, H, W): means of C / channels neighbouring channels."""
    return x.unflatten(1, (channels, -1)).mean(2)


def repeated(x: Tensor, channels: int) -> Tensor:
    """(B, C, H, W) -> (B, channels, H, W): channels / C copies of each channel side by side."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


class Film(nn.Module):
    """(1 + scale) * x + shift of features (B, C, ...) by a condition (B, E), with [scale, shift]
    linear in it, per channel (FiLM, Perez et al. 2018).

    Weights start at zero and nothing is drawn: before training it is the identity, and a
    conditional model begins with the weights of the unconditional one of its seed.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * channels, LABEL_DIMS))
        self.bias = nn.Parameter(torch.zeros(2 * channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        moved: Tensor = F.linear(condition, self.weight, self.bias)
        scale, shift = moved.view(*moved.shape, *[1] * (x.ndim - 2)).chunk(2, dim=1)
        return (1 + scale) * x + shift


# no layer draws, so the random state need not be kept
_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Block(nn.Module):
    """A piece of a tower, x (B, C, H, W) and for some a condition (B, E) -> features."""

    def forward_again(self, *inputs: Tensor | None) -> Tensor:
        """`forward` that the backward runs once more; a method, which the compiler can begin at."""
        h: Tensor = _again(type(self).forward, self, *inputs)
        return h


def recompute_in_backward(model: nn.Module) -> None:
    """Turn gradient checkpointing on: the backward keeps the input of each block, and of a tower's
    `to_images`, and runs them again."""
    module: Any
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = module.forward_again
        elif hasattr(module, "to_images"):
            module.to_images = partial(_again, module.to_images)


class ResidualBlock(Block):
    """(B, in_channels, H, W) -> (B, out_channels, H, W); `has_film`: of a condition too."""

    def __init__(
        self, in_channels: int, out_channels: int, *, norm_groups: int, has_film: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(norm_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(norm_groups, out_channels)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = (
            None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )
        self.film = Film(out_channels) if has_film else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h: Tensor = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.film is not None:
            h = self.film(h, condition)
        h = self.conv2(F.silu(h))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class AttentionBlock(Block):
    """Self-attention over the positions of a feature map, one head, shape unchanged."""

    def __init__(self, channels: int, *, norm_groups: int) -> None:
        super().__init__()
        self.group_norm = group_norm(norm_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([zeroed(nn.Linear(channels, channels))])

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        # the head axis of size one lets PyTorch choose its fused kernels
        q, k, v = (layer(h).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).reshape(x.shape)


class Downsample(Block):
    """(B, in_channels, H, W) -> (B, out_channels, H/2, W/2), for even H and W."""

    def __init__(self, in_channels: int, out_channels: int, *, shortcut: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2)
        self.shortcut = shortcut
        if shortcut:
            zeroed(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        # padding on the right and bottom only, as the exported format has it
        h: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return h + averaged(F.pixel_unshuffle(x, 2), h.shape[1]) if self.shortcut else h


class Upsample(Block):
    """(B, in_channels, H, W) -> (B, out_channels, 2H, 2W): nearest neighbours, then a
    convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, shortcut: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.shortcut = shortcut
        if shortcut:
            zeroed(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor
        if x.device.type == "cpu" and x.shape[2] * x.shape[3] >= SMALLEST_MAP:
            h = convolution_of_doubled(x, self.conv.weight, self.conv.bias)
        else:
            h = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return h + F.pixel_shuffle(repeated(x, 4 * h.shape[1]), 2) if self.shortcut else h


def convolution_of_doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1) of a 3x3
    weight, without the enlarged `x`: 4/9 of the products. In float32 they agree to rounding.

    An output row 2i sees rows i - 1, i, i of `x`, an output row 2i + 1 rows i, i, i + 1: two rows,
    with weights (w0, w1 + w2) or (w0 + w1, w2). Columns likewise, so each of the four places of an
    output in its 2x2 has a 2x2 kernel.
    """
    batch, _, height, width = x.shape
    rows = []
    for i, of_row in enumerate(_pairs(weight, 2)):
        row = [
            F.conv2d(x, kernel, bias, padding=1)[..., i : i + height, j : j + width]
            for j, kernel in enumerate(_pairs(of_row, 3))
        ]
        rows.append(torch.stack(row, 4))
    return torch.stack(rows, 3).view(batch, -1, 2 * height, 2 * width)  # of (B, C, H, 2, W, 2)


def _pairs(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three weights along `dim` -> the two of an even and of an odd place."""
    first, middle, last = weight.unbind(dim)
    even = torch.stack([first, middle + last], dim)
    return even, torch.stack([first + middle, last], dim)
