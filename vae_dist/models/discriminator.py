"""PatchGAN (Isola et al. 2017): is each patch of a picture real, or a reconstruction?

In: images (B, C, H, W) in [-1, 1]. Out: logits (B, 1, H', W'), float32, high for real; each sees a
patch of the picture (70 pixels with three layers).

    conv 4x4 /2, [conv 4x4 /2, norm] x (layers - 1), conv 4x4, norm, conv 4x4      leaky ReLU 0.2

The published network normalises over the batch, so that a logit depends on which images are
together. Here it is GroupNorm: the logits of an image are its own, so neither microbatches nor
ranks change them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.config.schema import AdversarialConfig
from vae_dist.models.blocks import group_norm, in_float32
from vae_dist.models.build import initialised

MAX_GROUPS = 32
MAX_WIDENING = 8  # of the first width
SLOPE = 0.2  # of the leaky ReLU
INITIAL_STD = 0.02


class PatchDiscriminator(nn.Module):
    """`layers` strided convolutions, the first of width `channels`; each doubles the width, up to
    eight times."""

    def __init__(self, in_channels: int, config: AdversarialConfig) -> None:
        super().__init__()
        layers = config.layers
        widths = [config.channels * min(2**i, MAX_WIDENING) for i in range(layers + 1)]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1)
        self.convs = nn.ModuleList(
            # the norm has a shift of its own
            nn.Conv2d(a, b, 4, stride=2 if i < layers - 1 else 1, padding=1, bias=False)
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(group_norm(math.gcd(MAX_GROUPS, w), w) for w in widths[1:])
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        # Not trained: while logits are within the margins of the hinge, those of real and of
        # reconstructed patches cancel in its gradient but for rounding, which Adam makes whole
        # steps of: other ones for another number of ranks. The norms have shifts.
        assert self.conv_out.bias is not None
        self.conv_out.bias.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, INITIAL_STD)

    def forward(self, images: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv_in(images), SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), SLOPE)
        return in_float32(self.conv_out, h)


def smallest_side(layers: int) -> int:
    """Pixels of the shorter side from which there is a logit, and each norm has several values."""
    return 3 * 2**layers


def build_discriminator(
    config: AdversarialConfig, *, image_channels: int, seed: int
) -> PatchDiscriminator:
    """As `initialised`."""
    with initialised(seed, "discriminator"):
        return PatchDiscriminator(image_channels, config)
