"""The convolutional towers: images to the moments of q(z|x), and z to the parameters of p(x|z).

    encoder: conv_in -> level 0 -> down -> level 1 -> ... -> middle -> norm, silu -> last layer
    decoder: first layer -> middle -> level n-1 -> up -> ... -> level 0 -> norm, silu -> conv_out

Level i has width `channels[i]`; a level of the encoder holds `blocks` residual blocks, one of the
decoder `blocks + 1`. Squares of patch x patch pixels are channels of level 0 (space to depth), so
with n levels the stride is f = patch * 2^(n-1). Two forms of the latent:

    spatial (feature_size=None): last and first layer are 3x3 convolutions, any H and W
    vector  (feature_size=(h, w)): linear layers on the whole last feature map of h x w positions

The last layer of each tower is float32 outside autocast: one bfloat16 step of a decoder output near
1 is half an 8-bit level, and the moments feed an exponential.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.models.blocks import AttentionBlock, Downsample, ResidualBlock, Upsample, group_norm


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) in float32, whatever autocast says around it."""
    if not torch.amp.is_autocast_available(x.device.type):  # such as meta
        return layer(x.float())
    with torch.autocast(device_type=x.device.type, enabled=False):
        h: Tensor = layer(x.float())
        return h


class Level(nn.Module):
    """Residual blocks of one resolution, then perhaps a change of resolution."""

    def __init__(
        self, in_channels: int, out_channels: int, *, blocks: int, norm_groups: int
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.resnets = nn.ModuleList(
            ResidualBlock(a, b, norm_groups=norm_groups) for a, b in pairwise(widths)
        )


class DownLevel(Level):
    def __init__(
        self, in_channels: int, out_channels: int, *, blocks: int, norm_groups: int, down: bool
    ) -> None:
        super().__init__(in_channels, out_channels, blocks=blocks, norm_groups=norm_groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if down else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpLevel(Level):
    def __init__(
        self, in_channels: int, out_channels: int, *, blocks: int, norm_groups: int, up: bool
    ) -> None:
        super().__init__(in_channels, out_channels, blocks=blocks, norm_groups=norm_groups)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Middle(nn.Module):
    """Residual block, attention (optional), residual block at the lowest resolution."""

    def __init__(self, channels: int, *, norm_groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            [AttentionBlock(channels, norm_groups=norm_groups)] if attention else []
        )
        self.resnets = nn.ModuleList(
            ResidualBlock(channels, channels, norm_groups=norm_groups) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Images (B, in_channels, H, W), H and W multiples of the stride -> float32 moments,
    (B, out_channels, H/f, W/f), or (B, out_channels) with a `feature_size`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int],
        blocks: int,
        norm_groups: int,
        attention: bool,
        patch: int = 1,
        feature_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.conv_in = nn.Conv2d(in_channels * patch**2, channels[0], 3, padding=1)
        widths = [channels[0], *channels]
        self.down_blocks = nn.ModuleList(
            DownLevel(a, b, blocks=blocks, norm_groups=norm_groups, down=i < len(channels) - 1)
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.mid_block = Middle(channels[-1], norm_groups=norm_groups, attention=attention)
        self.conv_norm_out = group_norm(norm_groups, channels[-1])
        if feature_size is None:
            self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)
        else:
            height, width = feature_size
            self.linear_out = nn.Linear(channels[-1] * height * width, out_channels)
        self.is_spatial = feature_size is None

    def forward(self, images: Tensor) -> Tensor:
        h: Tensor = self.conv_in(F.pixel_unshuffle(images, self.patch))
        for level in self.down_blocks:
            h = level(h)
        h = F.silu(self.conv_norm_out(self.mid_block(h)))
        if self.is_spatial:
            return in_float32(self.conv_out, h)
        return in_float32(self.linear_out, h.flatten(1))


class Decoder(nn.Module):
    """z (B, in_channels, h, w), or (B, in_channels) with a `feature_size` -> float32 parameters of
    the likelihood (B, out_channels, f*h, f*w)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int],
        blocks: int,
        norm_groups: int,
        attention: bool,
        patch: int = 1,
        feature_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.patch = patch
        last = channels[-1]
        if feature_size is None:
            self.conv_in = nn.Conv2d(in_channels, last, 3, padding=1)
        else:
            height, width = feature_size
            self.linear_in = nn.Linear(in_channels, last * height * width)
        self.feature_size = feature_size
        self.mid_block = Middle(last, norm_groups=norm_groups, attention=attention)
        widths = [last, *reversed(channels)]
        self.up_blocks = nn.ModuleList(
            UpLevel(a, b, blocks=blocks + 1, norm_groups=norm_groups, up=i < len(channels) - 1)
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.conv_norm_out = group_norm(norm_groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], out_channels * patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        if self.feature_size is None:
            h: Tensor = self.conv_in(z)
        else:
            h = self.linear_in(z).unflatten(1, (-1, *self.feature_size))
        h = self.mid_block(h)
        for level in self.up_blocks:
            h = level(h)
        h = F.silu(self.conv_norm_out(h))
        return F.pixel_shuffle(in_float32(self.conv_out, h), self.patch)
