"""The towers: images to the moments of q(z|x), and z to the parameters of p(x|z).

    encoder: conv_in -> level 0 -> down -> level 1 -> ... -> middle -> norm, silu -> last layer
    decoder: first layer -> middle -> level n-1 -> up -> ... -> level 0 -> norm, silu -> conv_out

Level i has width `channels[i]`; it holds `blocks[i]` residual blocks in the encoder and one more in
the decoder. Squares of patch x patch pixels are channels of level 0 (space to depth), so
with n levels the stride is f = patch * 2^(n-1). Two forms of the latent:

    spatial (size=None): last and first layer are 3x3 convolutions, any H and W
    vector  (size=(h, w)): linear layers on the whole last feature map of h x w positions

With shortcuts (DC-AE), the changes of resolution change the width as well, and the layers around a
spatial latent have one too: means of neighbouring channels are added to the means of z, copies of
z's channels to what the decoder makes of it. With labels, a condition (B, E) scales and shifts
(FiLM) each channel of a residual block, and each feature at a linear layer of a vector
latent: with channels alone, the same at all positions, samples miss the class that is asked for.

Dense towers are those of the textbook VAE (Kingma & Welling 2014), for small images of one size:

    encoder: pixels -> linear, relu -> ... -> linear          decoder: z -> linear, relu -> ...

with `channels[i]` the width of hidden layer i of the encoder; the decoder has them backwards.

The last layer of each tower is float32 outside autocast: one bfloat16 step of a decoder output near
1 is half an 8-bit level, and the moments feed an exponential.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.config.schema import ModelConfig
from vae_dist.models.blocks import (
    AttentionBlock,
    Downsample,
    Film,
    ResidualBlock,
    Upsample,
    averaged,
    group_norm,
    in_float32,
    repeated,
)

Size = tuple[int, int]  # rows and columns of the last feature map
Shape = tuple[int, int, int]


def residual_blocks(model: ModelConfig, widths: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(
        ResidualBlock(a, b, norm_groups=model.norm_groups, has_film=model.num_classes > 0)
        for a, b in pairwise(widths)
    )


class Level(nn.Module):
    """Residual blocks of level i of a tower, then `change` of resolution unless it is the last one.
    The first residual block changes the width, or, with shortcuts, the change before it. The name
    `samplers` is that of the format that models are exported to."""

    def __init__(
        self,
        channels: Sequence[int],
        i: int,
        blocks: int,
        model: ModelConfig,
        change: type[Downsample] | type[Upsample],
    ) -> None:
        super().__init__()
        has_shortcuts, width = model.dc_shortcuts, channels[i]
        first = width if has_shortcuts else channels[max(0, i - 1)]
        self.resnets = residual_blocks(model, [first] + [width] * blocks)
        layers = nn.ModuleList()
        if i + 1 < len(channels):
            following = channels[i + 1] if has_shortcuts else width
            layers.append(change(width, following, shortcut=has_shortcuts))
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

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width = model.channels[-1]
        self.attentions = nn.ModuleList(
            [AttentionBlock(width, norm_groups=model.norm_groups)] if model.attention else []
        )
        self.resnets = residual_blocks(model, [width] * 3)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, condition)
        for layer in self.attentions:
            x = layer(x)
        h: Tensor = self.resnets[1](x, condition)
        return h


class Encoder(nn.Module):
    """Images (B, inputs, H, W), H and W multiples of the stride -> float32 moments,
    (B, outputs, H/f, W/f), or (B, outputs) with a size."""

    def __init__(self, inputs: int, outputs: int, model: ModelConfig, size: Size | None) -> None:
        super().__init__()
        self.patch, self.shortcuts, self.size = model.patch, model.dc_shortcuts, size
        widths, last = model.channels, model.channels[-1]
        self.conv_in = nn.Conv2d(inputs * model.patch**2, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths, i, count, model, Downsample) for i, count in enumerate(model.blocks)
        )
        self.mid_block = Middle(model)
        self.conv_norm_out = group_norm(model.norm_groups, last)
        self.film_out = None
        if size is None:
            self.conv_out = nn.Conv2d(last, outputs, 3, padding=1)
        else:
            num_features = last * math.prod(size)
            self.linear_out = nn.Linear(num_features, outputs)
            self.film_out = Film(num_features) if model.num_classes else None

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        h: Tensor = self.conv_in(F.pixel_unshuffle(images, self.patch))
        for level in self.down_blocks:
            h = level(h, condition)
        last = self.mid_block(h, condition)
        h = F.silu(self.conv_norm_out(last))
        if self.size is not None:
            h = h.flatten(1)
            h = h if self.film_out is None else self.film_out(h, condition)
            return in_float32(self.linear_out, h)
        moments = in_float32(self.conv_out, h)
        if not self.shortcuts:
            return moments
        mean, log_variance = moments.chunk(2, dim=1)
        return torch.cat([mean + averaged(last.float(), mean.shape[1]), log_variance], 1)


class Decoder(nn.Module):
    """z (B, inputs, h, w), or (B, inputs) with a size -> float32 parameters of the likelihood
    (B, outputs, f*h, f*w)."""

    def __init__(self, inputs: int, outputs: int, model: ModelConfig, size: Size | None) -> None:
        super().__init__()
        self.patch, self.shortcuts, self.size = model.patch, model.dc_shortcuts, size
        widths = model.channels[::-1]
        self.film_in = None
        if size is None:
            self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        else:
            num_features = widths[0] * math.prod(size)
            self.linear_in = nn.Linear(inputs, num_features)
            self.film_in = Film(num_features) if model.num_classes else None
        self.mid_block = Middle(model)
        self.up_blocks = nn.ModuleList(
            Level(widths, i, count + 1, model, Upsample)
            for i, count in enumerate(model.blocks[::-1])
        )
        self.conv_norm_out = group_norm(model.norm_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], outputs * model.patch**2, 3, padding=1)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.size is None:
            h: Tensor = self.conv_in(z)
            h = h + repeated(z, h.shape[1]) if self.shortcuts else h
        else:
            h = self.linear_in(z)
            h = h if self.film_in is None else self.film_in(h, condition)
            h = h.unflatten(1, (-1, *self.size))
        h = self.mid_block(h, condition)
        for level in self.up_blocks:
            h = level(h, condition)
        return self.to_images(h)

    def to_images(self, h: Tensor) -> Tensor:
        h = F.silu(self.conv_norm_out(h))
        return F.pixel_shuffle(in_float32(self.conv_out, h), self.patch)


# dense towers


class _Hidden(nn.Module):
    """Hidden layers of the given widths, the first of which is the input's."""

    def __init__(self, widths: Sequence[int], *, has_film: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.films = nn.ModuleList(map(Film, widths[1:]) if has_film else [])

    def forward(self, h: Tensor, condition: Tensor | None) -> Tensor:
        for i, layer in enumerate(self.layers):
            h = layer(h)
            if self.films:
                h = self.films[i](h, condition)
            h = F.relu(h)
        return h


class DenseEncoder(nn.Module):
    """Images (B, C, H, W) of `image_shape` -> float32 moments (B, out_channels)."""

    def __init__(self, image_shape: Shape, out_channels: int, model: ModelConfig) -> None:
        super().__init__()
        widths = [math.prod(image_shape), *model.channels]
        self.hidden = _Hidden(widths, has_film=model.num_classes > 0)
        self.linear_out = nn.Linear(widths[-1], out_channels)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        return in_float32(self.linear_out, self.hidden(images.flatten(1), condition))


class DenseDecoder(nn.Module):
    """z (B, in_channels) -> float32 parameters of the likelihood, (B, *params_shape)."""

    def __init__(self, in_channels: int, params_shape: Shape, model: ModelConfig) -> None:
        super().__init__()
        self.params_shape = params_shape
        widths = [in_channels, *reversed(model.channels)]
        self.hidden = _Hidden(widths, has_film=model.num_classes > 0)
        self.linear_out = nn.Linear(widths[-1], math.prod(params_shape))

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        h = in_float32(self.linear_out, self.hidden(z, condition))
        return h.unflatten(1, self.params_shape)
