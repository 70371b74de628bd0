"""The towers: images to the moments of q(z|x), and z to the parameters of p(x|z).

    encoder: conv_in -> level 0 -> down -> level 1 -> ... -> middle -> norm, silu -> last layer
    decoder: first layer -> middle -> level n-1 -> up -> ... -> level 0 -> norm, silu -> conv_out

Level i has width `channels[i]`; it holds `blocks[i]` residual blocks in the encoder and one more in
the decoder. Squares of patch x patch pixels are channels of level 0 (space to depth), so
with n levels the stride is f = patch * 2^(n-1). Two forms of the latent:

    spatial (feature_size=None): last and first layer are 3x3 convolutions, any H and W
    vector  (feature_size=(h, w)): linear layers on the whole last feature map of h x w positions

With shortcuts (DC-AE), the changes of resolution change the width as well, and the layers around a
spatial latent have one too: means of neighbouring channels are added to the means of z, copies of
z's channels to what the decoder makes of it. With condition_dims, a condition (B, E) scales and
shifts (FiLM) each channel of a residual block, and each feature at a linear layer of a vector
latent: with channels alone, the same at all positions, samples miss the class that is asked for.

Dense towers are those of the textbook VAE (Kingma & Welling 2014), for small images of one size:

    encoder: pixels -> linear, relu -> ... -> linear          decoder: z -> linear, relu -> ...

with `channels[i]` the width of hidden layer i of the encoder; the decoder has them backwards.

The last layer of each tower is float32 outside autocast: one bfloat16 step of a decoder output near
1 is half an 8-bit level, and the moments feed an exponential.
"""

from __future__ import annotations

import math
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

    @property
    def num_features(self) -> int:
        """Values of the last feature map that a vector latent is linear in."""
        height, width = self.feature_size or (0, 0)
        return self.channels[-1] * height * width

    def resnets(self, widths: Sequence[int]) -> nn.ModuleList:
        return nn.ModuleList(
            ResidualBlock(a, b, norm_groups=self.norm_groups, condition_dims=self.condition_dims)
            for a, b in pairwise(widths)
        )

    def widths(self, *, upwards: bool) -> Iterator[tuple[int, int, int | None]]:
        """(in, out, next) channels of each level in the order of a tower; next is None for the
        last. The first residual block of a level changes the width, or, with shortcuts, the change
        of resolution before it."""
        channels = list(reversed(self.channels)) if upwards else self.channels
        for i, width in enumerate(channels):
            following = channels[i + 1] if i + 1 < len(channels) else None
            if self.shortcuts:
                yield width, width, following
            else:
                yield channels[max(0, i - 1)], width, None if following is None else width


class Level(nn.Module):
    """Residual blocks of one resolution, then `change` of it unless it is the last level. Its name
    `samplers` is that of the format that models are exported to."""

    def __init__(
        self,
        widths: tuple[int, int, int | None],
        blocks: int,
        options: TowerOptions,
        change: type[Downsample] | type[Upsample],
    ) -> None:
        super().__init__()
        first, width, following = widths
        self.resnets = options.resnets([first] + [width] * blocks)
        layers = nn.ModuleList()
        if following is not None:
            layers.append(change(width, following, shortcut=options.shortcuts))
        self._samplers = "downsamplers" if change is Downsample else "upsamplers"
        self.add_module(self._samplers, layers)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for block in self.resnets:
            x = block(x, condition)
        for layer in getattr(self, self._samplers):
            x = layer(x)
        return x


class Middle(nn.Module):
    """Residual block, attention (optional), residual block at the lowest resolution."""

    def __init__(self, options: TowerOptions) -> None:
        super().__init__()
        width = options.channels[-1]
        self.attentions = nn.ModuleList(
            [AttentionBlock(width, norm_groups=options.norm_groups)] if options.attention else []
        )
        self.resnets = options.resnets([width] * 3)

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
        self.down_blocks = nn.ModuleList(
            Level(widths, count, options, Downsample)
            for count, widths in zip(options.blocks, options.widths(upwards=False), strict=True)
        )
        self.mid_block = Middle(options)
        self.conv_norm_out = group_norm(options.norm_groups, last)
        if options.feature_size is None:
            self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)
        else:
            self.linear_out = nn.Linear(options.num_features, out_channels)
            if options.condition_dims:
                self.film_out = Film(options.condition_dims, options.num_features)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        h: Tensor = self.conv_in(F.pixel_unshuffle(images, self.options.patch))
        for level in self.down_blocks:
            h = level(h, condition)
        last = self.mid_block(h, condition)
        h = F.silu(self.conv_norm_out(last))
        if self.options.feature_size is not None:
            h = h.flatten(1)
            if self.options.condition_dims:
                h = self.film_out(h, condition)
            return in_float32(self.linear_out, h)
        moments = in_float32(self.conv_out, h)
        if not self.options.shortcuts:
            return moments
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
            self.linear_in = nn.Linear(in_channels, options.num_features)
            if options.condition_dims:
                self.film_in = Film(options.condition_dims, options.num_features)
        self.mid_block = Middle(options)
        levels = zip(reversed(options.blocks), options.widths(upwards=True), strict=True)
        self.up_blocks = nn.ModuleList(
            Level(widths, count + 1, options, Upsample) for count, widths in levels
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


# dense towers

Shape = tuple[int, int, int]


class _Hidden(nn.Module):
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
            if self.films:
                h = self.films[i](h, condition)
            h = F.relu(h)
        return h


class DenseEncoder(nn.Module):
    """Images (B, C, H, W) of `image_shape` -> float32 moments (B, out_channels)."""

    def __init__(
        self, image_shape: Shape, out_channels: int, channels: Sequence[int], condition_dims: int
    ) -> None:
        super().__init__()
        self.hidden = _Hidden([math.prod(image_shape), *channels], condition_dims)
        self.linear_out = nn.Linear(channels[-1], out_channels)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        return in_float32(self.linear_out, self.hidden(images.flatten(1), condition))


class DenseDecoder(nn.Module):
    """z (B, in_channels) -> float32 parameters of the likelihood, (B, *params_shape)."""

    def __init__(
        self, in_channels: int, params_shape: Shape, channels: Sequence[int], condition_dims: int
    ) -> None:
        super().__init__()
        self.params_shape = params_shape
        self.hidden = _Hidden([in_channels, *reversed(channels)], condition_dims)
        self.linear_out = nn.Linear(channels[0], math.prod(params_shape))

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        h = in_float32(self.linear_out, self.hidden(z, condition))
        return h.unflatten(1, self.params_shape)
