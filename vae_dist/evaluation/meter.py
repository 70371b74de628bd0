"""What an evaluation shows to those who measure, and what they answer.

A `Meter` sees each image once, over all ranks together, and keeps float64 sums; `report` adds those
of all ranks. So a figure depends neither on the number of ranks nor on the batch size.

Legend: b images of one shape C x H x W, all of which count: padding is left out before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vae_dist.config.errors import ConfigError
from vae_dist.distributed import Runtime
from vae_dist.models.vae import VAE, VAEOutput
from vae_dist.tracking.images import to_uint8


class Inputs(NamedTuple):
    """What a model is given, on its device."""

    levels: Tensor  # (b, C, H, W) as stored: uint8, uint16 or float32
    images: Tensor  # (b, C, H, W) float32 in [-1, 1], as `prepare` made them
    samples: list[int]  # number of each image in index order
    labels: Tensor | None = None  # int64 (b,), -1 where an image has none
    mask: Tensor | None = None  # uint8 (b, 1, H, W), 1: observed; None: all pixels are

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.images.shape[-2:]
        return height, width

    @property
    def dims(self) -> Tensor:
        """Values of each image that its likelihood counts, float64 (b,)."""
        if self.mask is not None:
            return self.images.shape[1] * self.mask.flatten(1).sum(1, dtype=torch.float64)
        num_dims = self.images[0].numel()
        return torch.full((len(self.images),), num_dims, dtype=torch.float64).to(self.images.device)


@dataclass(frozen=True)
class Seen:
    """A batch and what the model's forward made of it: encoder and decoder once per image."""

    model: VAE
    inputs: Inputs
    noise: Tensor  # (b, *latent) of the z that `output` was decoded from
    output: VAEOutput

    @cached_property
    def pictures(self) -> tuple[Tensor, Tensor]:
        """Images and their reconstructions E[x | z = E[z|x]], float32 (b, C, H, W) in [0, 1]; where
        images have 8 bits, both are rounded to them, as a PNG of them is. Of images that are cut to
        fewer bits, what is left is the original: the model has seen no other."""
        params = self.model.decode(self.output.mean, self.inputs.image_size, self.inputs.labels)
        means = self.model.likelihood.mean(params)
        levels = self.inputs.levels
        if levels.dtype == torch.uint8:
            originals = self.model.likelihood.levels.centers(levels)
            return to_uint8(originals).float() / 255, to_uint8(means).float() / 255
        means = (means.float() + 1).clamp(0, 2) / 2
        if levels.dtype == torch.uint16:
            return levels.float() / 65535, means
        return (levels.float() + 1) / 2, means


@dataclass(frozen=True)
class Report:
    """Figures by name; a note says in a sentence why one that was asked for is missing."""

    figures: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


class Meter(Protocol):
    def add(self, seen: Seen) -> None:
        """Called by each rank for each of its batches, in inference mode."""

    def report(self, runtime: Runtime) -> Report:
        """Called once, by every rank together; the same on each."""


def in_colour(images: Tensor) -> Tensor:
    """(b, 3, H, W) for networks that know no others; grey is repeated."""
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ConfigError(
            f"lpips, rfid and fid are defined for grey and RGB images, not for {channels} "
            "channels; leave them out of metrics="
        )
    return images.expand(-1, 3, -1, -1)


def mean_and_error(total: float, squares: float, count: float) -> tuple[float, float]:
    """Mean of `count` values from their sum and sum of squares, and its standard error (0 for one
    value)."""
    mean = total / count
    variance = max(0.0, squares / count - mean * mean)
    return mean, (variance / max(1.0, count - 1.0)) ** 0.5
