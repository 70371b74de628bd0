"""The convolutional towers: images to the moments of q(z|x), and z to the parameters of p(x|z).

    encoder: conv_in -> level 0 -> down -> level 1 -> ... -> middle -> norm, silu -> last layer
    decoder: first layer -> middle -> level n-1 -> up -> ... -> level 0 -> norm, silu -> conv_out

Level i has width `channels[i]`; it holds `blocks[i]` residual blocks in the encoder and one more in
the decoder. Squares of patch x patch pixels are channels of level 0 (space to depth), so
with n levels the stride is f = patch * 2^(n-1). Two forms of the latent:

    spatial (feature_size=None): last and first layer are 3x3 convolutions, any H and W
    vector  (feature_size=(h, w)): linear layers on the whole last feature map of h x w positions

With shortcuts (DC-AE), the changes of resolution change the width as well and have a shortcut
without parameters, as the layers around a spatial latent do: means of neighbouring channels are
added to the means of z, copies of z's channels to what the decoder makes of it. Before training, an
image can pass such towers by its shortcuts alone.

With condition_dims, each residual block is told the condition (B, E) by a scale and shift (FiLM) of
each channel, and a linear layer of a vector latent by one of each feature: with those of channels
alone, which are the same at all positions, classes stay in z, and samples miss the class asked for.

The last layer of each tower is float32 outside autocast: one bfloat16 step of a decoder output near
1 is half an 8-bit level, and the moments feed an exponential.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.models.blocks import (
    AttentionBlock,
    Downsample,
    Film,
    Recomputable,
    ResidualBlock,
    Upsample,
    averaged,
    group_norm,
    in_float32,
    repeated,
)


class Level(nn.Module):
    """Residual blocks of one resolution, then perhaps a change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        blocks: int,
        norm_groups: int,
        condition_dims: int = 0,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.resnets = nn.ModuleList(
            ResidualBlock(a, b, norm_groups=norm_groups, condition_dims=condition_dims)
            for a, b in pairwise(widths)
        )


class DownLevel(Level):
    """`next_channels`: those of the level that a change of resolution leads to; None: the last."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        next_channels: int | None,
        shortcuts: bool,
        **blocks: int,
    ) -> None:
        super().__init__(in_channels, out_channels, **blocks)
        self.downsamplers = nn.ModuleList()
        if next_channels is not None:
            down = Downsample(out_channels, next_channels, shortcut=shortcuts)
            self.downsamplers.append(down)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for block in self.resnets:
            x = block(x, condition)
        for layer in self.downsamplers:
            x = layer(x)
        return x


class UpLevel(Level):
    """As DownLevel, with a rise of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        next_channels: int | None,
        shortcuts: bool,
        **blocks: int,
    ) -> None:
        super().__init__(in_channels, out_channels, **blocks)
        self.upsamplers = nn.ModuleList()
        if next_channels is not None:
            self.upsamplers.append(Upsample(out_channels, next_channels, shortcut=shortcuts))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for block in self.resnets:
            x = block(x, condition)
        for layer in self.upsamplers:
            x = layer(x)
        return x


def level_widths(
    channels: Sequence[int], *, shortcuts: bool
) -> Iterator[tuple[int, int, int | None]]:
    """(in, out, next) channels of each level, in the order in which a tower goes through them.

    What changes the width is the first residual block of a level, or, with shortcuts, the change of
    resolution before it.
    """
    for i, width in enumerate(channels):
        following = channels[i + 1] if i + 1 < len(channels) else None
        if shortcuts:
            yield width, width, following
        else:
            yield channels[max(0, i - 1)], width, None if following is None else width


class Middle(nn.Module):
    """Residual block, attention (optional), residual block at the lowest resolution."""

    def __init__(
        self, channels: int, *, norm_groups: int, attention: bool, condition_dims: int = 0
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            [AttentionBlock(channels, norm_groups=norm_groups)] if attention else []
        )
        self.resnets = nn.ModuleList(
            ResidualBlock(
                channels, channels, norm_groups=norm_groups, condition_dims=condition_dims
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, condition)
        for layer in self.attentions:
            x = layer(x)
        h: Tensor = self.resnets[1](x, condition)
        return h


class Encoder(nn.Module):
    """Images (B, in_channels, H, W), H and W multiples of the stride -> float32 moments,
    (B, out_channels, H/f, W/f), or (B, out_channels) with a `feature_size`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int],
        blocks: Sequence[int],
        norm_groups: int,
        attention: bool,
        patch: int = 1,
        shortcuts: bool = False,
        feature_size: tuple[int, int] | None = None,
        condition_dims: int = 0,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.conv_in = nn.Conv2d(in_channels * patch**2, channels[0], 3, padding=1)
        levels = level_widths(channels, shortcuts=shortcuts)
        self.down_blocks = nn.ModuleList(
            DownLevel(
                before,
                width,
                next_channels=following,
                shortcuts=shortcuts,
                blocks=count,
                norm_groups=norm_groups,
                condition_dims=condition_dims,
            )
            for count, (before, width, following) in zip(blocks, levels, strict=True)
        )
        self.mid_block = Middle(
            channels[-1],
            norm_groups=norm_groups,
            attention=attention,
            condition_dims=condition_dims,
        )
        self.conv_norm_out = group_norm(norm_groups, channels[-1])
        if feature_size is None:
            self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)
        else:
            height, width = feature_size
            self.linear_out = nn.Linear(channels[-1] * height * width, out_channels)
            if condition_dims:
                self.film_out = Film(condition_dims, channels[-1] * height * width)
        self.is_conditional = condition_dims > 0
        self.is_spatial = feature_size is None
        self.has_shortcuts = shortcuts

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        h: Tensor = self.conv_in(F.pixel_unshuffle(images, self.patch))
        for level in self.down_blocks:
            h = level(h, condition)
        last = self.mid_block(h, condition)
        h = F.silu(self.conv_norm_out(last))
        if self.is_spatial:
            moments = in_float32(self.conv_out, h)
            return self._with_shortcut(moments, last) if self.has_shortcuts else moments
        h = h.flatten(1)
        if self.is_conditional:
            h = self.film_out(h, condition)
        return in_float32(self.linear_out, h)

    def _with_shortcut(self, moments: Tensor, last: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        return torch.cat([mean + averaged(last.float(), mean.shape[1]), log_variance], 1)


class Decoder(Recomputable):
    """z (B, in_channels, h, w), or (B, in_channels) with a `feature_size` -> float32 parameters of
    the likelihood (B, out_channels, f*h, f*w)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int],
        blocks: Sequence[int],
        norm_groups: int,
        attention: bool,
        patch: int = 1,
        shortcuts: bool = False,
        feature_size: tuple[int, int] | None = None,
        condition_dims: int = 0,
    ) -> None:
        super().__init__()
        self.patch = patch
        last = channels[-1]
        if feature_size is None:
            self.conv_in = nn.Conv2d(in_channels, last, 3, padding=1)
        else:
            height, width = feature_size
            self.linear_in = nn.Linear(in_channels, last * height * width)
            if condition_dims:
                self.film_in = Film(condition_dims, last * height * width)
        self.is_conditional = condition_dims > 0
        self.feature_size = feature_size
        self.has_shortcuts = shortcuts
        self.mid_block = Middle(
            last, norm_groups=norm_groups, attention=attention, condition_dims=condition_dims
        )
        levels = level_widths(list(reversed(channels)), shortcuts=shortcuts)
        self.up_blocks = nn.ModuleList(
            UpLevel(
                before,
                width,
                next_channels=following,
                shortcuts=shortcuts,
                blocks=count + 1,
                norm_groups=norm_groups,
                condition_dims=condition_dims,
            )
            for count, (before, width, following) in zip(reversed(blocks), levels, strict=True)
        )
        self.conv_norm_out = group_norm(norm_groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], out_channels * patch**2, 3, padding=1)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.feature_size is None:
            h: Tensor = self.conv_in(z)
            if self.has_shortcuts:
                h = h + repeated(z, h.shape[1])
        else:
            h = self.linear_in(z)
            if self.is_conditional:
                h = self.film_in(h, condition)
            h = h.unflatten(1, (-1, *self.feature_size))
        h = self.mid_block(h, condition)
        for level in self.up_blocks:
            h = level(h, condition)
        return self.run(self._images, h)

    def _images(self, h: Tensor) -> Tensor:
        h = F.silu(self.conv_norm_out(h))
        return F.pixel_shuffle(in_float32(self.conv_out, h), self.patch)
