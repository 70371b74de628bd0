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

With condition_dims, a condition (B, E) scales and shifts (FiLM) each channel of a residual block,
and each feature at a linear layer of a vector latent: with those of channels alone, which are the
same at all positions, classes stay in z, and samples miss the class asked for.

The last layer of each tower is float32 outside autocast: one bfloat16 step of a decoder output near
1 is half an 8-bit level, and the moments feed an exponential.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class TowerOptions:
    """What encoder and decoder agree on."""

    channels: Sequence[int]  # of each level
    blocks: Sequence[int]  # of each level of the encoder
    norm_groups: int
    attention: bool
    patch: int = 1
    shortcuts: bool = False
    feature_size: tuple[int, int] | None = None
    condition_dims: int = 0

    def resnets(self, widths: Sequence[int]) -> nn.ModuleList:
        return nn.ModuleList(
            ResidualBlock(a, b, norm_groups=self.norm_groups, condition_dims=self.condition_dims)
            for a, b in pairwise(widths)
        )

    def film(self) -> Film:
        """Of the features of the last feature map."""
        assert self.feature_size is not None
        height, width = self.feature_size
        return Film(self.condition_dims, self.channels[-1] * height * width)


class Level(nn.Module):
    """Residual blocks of one resolution, then `change` of it to `next_channels` (None: the last
    level). Its name `samplers` is that of the format that models are exported to."""

    def __init__(
        self,
        widths: tuple[int, int, int | None],
        blocks: int,
        options: TowerOptions,
        *,
        change: type[Downsample] | type[Upsample],
    ) -> None:
        super().__init__()
        in_channels, out_channels, next_channels = widths
        self.resnets = options.resnets([in_channels] + [out_channels] * blocks)
        layers = nn.ModuleList()
        if next_channels is not None:
            layers.append(change(out_channels, next_channels, shortcut=options.shortcuts))
        self._samplers = "downsamplers" if change is Downsample else "upsamplers"
        self.add_module(self._samplers, layers)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for block in self.resnets:
            x = block(x, condition)
        for layer in getattr(self, self._samplers):
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

    def __init__(self, options: TowerOptions) -> None:
        super().__init__()
        channels = options.channels[-1]
        self.attentions = nn.ModuleList(
            [AttentionBlock(channels, norm_groups=options.norm_groups)] if options.attention else []
        )
        self.resnets = options.resnets([channels] * 3)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, condition)
        for layer in self.attentions:
            x = layer(x)
        h: Tensor = self.resnets[1](x, condition)
        return h


class Encoder(nn.Module):
    """Images (B, in_channels, H, W), H and W multiples of the stride -> float32 moments,
    (B, out_channels, H/f, W/f), or (B, out_channels) with a `feature_size`."""

    def __init__(self, in_channels: int, out_channels: int, options: TowerOptions) -> None:
        super().__init__()
        self.options = options
        channels, last = options.channels, options.channels[-1]
        self.conv_in = nn.Conv2d(in_channels * options.patch**2, channels[0], 3, padding=1)
        levels = level_widths(channels, shortcuts=options.shortcuts)
        self.down_blocks = nn.ModuleList(
            Level(widths, count, options, change=Downsample)
            for count, widths in zip(options.blocks, levels, strict=True)
        )
        self.mid_block = Middle(options)
        self.conv_norm_out = group_norm(options.norm_groups, last)
        if options.feature_size is None:
            self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)
        else:
            height, width = options.feature_size
            self.linear_out = nn.Linear(last * height * width, out_channels)
            if options.condition_dims:
                self.film_out = options.film()

    @property
    def last_layer(self) -> nn.Conv2d | nn.Linear:
        return self.conv_out if self.options.feature_size is None else self.linear_out

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        h: Tensor = self.conv_in(F.pixel_unshuffle(images, self.options.patch))
        for level in self.down_blocks:
            h = level(h, condition)
        last = self.mid_block(h, condition)
        h = F.silu(self.conv_norm_out(last))
        if self.options.feature_size is None:
            moments = in_float32(self.conv_out, h)
            return self._with_shortcut(moments, last) if self.options.shortcuts else moments
        h = h.flatten(1)
        if self.options.condition_dims:
            h = self.film_out(h, condition)
        return in_float32(self.linear_out, h)

    def _with_shortcut(self, moments: Tensor, last: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        return torch.cat([mean + averaged(last.float(), mean.shape[1]), log_variance], 1)


class Decoder(Recomputable):
    """z (B, in_channels, h, w), or (B, in_channels) with a `feature_size` -> float32 parameters of
    the likelihood (B, out_channels, f*h, f*w)."""

    def __init__(self, in_channels: int, out_channels: int, options: TowerOptions) -> None:
        super().__init__()
        self.options = options
        channels, last = options.channels, options.channels[-1]
        if options.feature_size is None:
            self.conv_in = nn.Conv2d(in_channels, last, 3, padding=1)
        else:
            height, width = options.feature_size
            self.linear_in = nn.Linear(in_channels, last * height * width)
            if options.condition_dims:
                self.film_in = options.film()
        self.mid_block = Middle(options)
        levels = level_widths(list(reversed(channels)), shortcuts=options.shortcuts)
        self.up_blocks = nn.ModuleList(
            Level(widths, count + 1, options, change=Upsample)
            for count, widths in zip(reversed(options.blocks), levels, strict=True)
        )
        self.conv_norm_out = group_norm(options.norm_groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], out_channels * options.patch**2, 3, padding=1)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.options.feature_size is None:
            h: Tensor = self.conv_in(z)
            if self.options.shortcuts:
                h = h + repeated(z, h.shape[1])
        else:
            h = self.linear_in(z)
            if self.options.condition_dims:
                h = self.film_in(h, condition)
            h = h.unflatten(1, (-1, *self.options.feature_size))
        h = self.mid_block(h, condition)
        for level in self.up_blocks:
            h = level(h, condition)
        return self.run(self._images, h)

    def _images(self, h: Tensor) -> Tensor:
        h = F.silu(self.conv_norm_out(h))
        return F.pixel_shuffle(in_float32(self.conv_out, h), self.options.patch)
