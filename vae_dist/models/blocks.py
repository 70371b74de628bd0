"""The blocks of both towers: residual block, self-attention, down, up.

In and out: feature maps (B, C, H, W). Names and shapes of the parameters are those of diffusers'
`AutoencoderKL`, so that a spatial model exports to it key by key.

    residual:   h = x' + conv2(silu(norm2(conv1(silu(norm1(x))))))     x' = x or conv_shortcut(x)
    attention:  h = x + to_out(softmax(q k^T / sqrt(C)) v)             one head over all positions

The last layer of each sum starts at zero: a block is x' before training, and a deep tower of them
takes a higher learning rate (Zhang et al. 2019, "Fixup Initialization").
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(num_groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=NORM_EPS)


class ResidualBlock(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(norm_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(norm_groups, out_channels)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = (
            None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map, one head, shape unchanged."""

    def __init__(self, channels: int, *, norm_groups: int) -> None:
        super().__init__()
        self.group_norm = group_norm(norm_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([zeroed(nn.Linear(channels, channels))])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h: Tensor = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        # The head axis of size one lets PyTorch choose its fused kernels.
        q, k, v = (layer(h).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        h = self.to_out[0](h)
        return x + h.transpose(1, 2).reshape(batch, channels, height, width)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2), for even H and W."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Padding on the right and bottom only, as the exported format has it.
        h: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return h


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return h
