"""Mean and spread of latents over a data set: by what a model of latents scales and shifts them.

For z ~ q(z|x), over images and positions, per channel c and over all channels:

    E[z_c] = E[mean_c],   Var[z_c] = Var[mean_c] + E[exp(log_variance_c)]
    shift_factor = E[z],  scaling_factor = 1 / sqrt(Var[z])

(z - shift_factor) * scaling_factor has mean 0 and variance 1: diffusers' convention. Nothing is
drawn. Sums are float64 and add up over batches, shards and ranks.

Legend: b images, U channels of a spatial latent (dimensions of a vector one), P positions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_dist.files import write_durably

FILE = "latents.json"  # in a run folder, and beside shards of latents


@dataclass(frozen=True)
class LatentStatistics:
    scaling_factor: float
    shift_factor: float
    mean: list[float]  # (U,)
    std: list[float]  # (U,)
    num_images: int

    def record(self) -> dict[str, Any]:
        """As `latents.json` holds it."""
        return {
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "per_channel": {"mean": self.mean, "std": self.std},
            "num_images": self.num_images,
        }


class LatentMoments:
    """Sums over the images that were added; `sums` may be added to those of other ranks."""

    def __init__(self, num_channels: int, device: torch.device | str = "cpu") -> None:
        # (3, U) of mean, mean squared, variance, flattened; then positions and images
        self.sums = torch.zeros(3 * num_channels + 2, dtype=torch.float64, device=device)

    def add(self, mean: Tensor, log_variance: Tensor | None) -> None:
        """Both (b, U, *positions); without log_variance, z is the mean."""
        mean = mean.flatten(2) if mean.ndim > 2 else mean.unsqueeze(2)  # (b, U, P)
        mean = mean.double()  # first: the variance is a difference of these sums
        within = torch.zeros_like(mean)
        if log_variance is not None:
            within = log_variance.double().exp().reshape(mean.shape)
        per_channel = torch.stack([mean, mean.square(), within]).sum((1, 3))  # (3, U)
        counts = per_channel.new_tensor([mean.shape[0] * mean.shape[2], mean.shape[0]])
        self.sums += torch.cat([per_channel.flatten(), counts])

    def add_sums(self, sums: Sequence[float] | Tensor) -> None:
        self.sums += torch.as_tensor(sums, dtype=torch.float64, device=self.sums.device)

    def statistics(self) -> LatentStatistics:
        """Of what was added, at least one image."""
        *flat, num_positions, num_images = self.sums.tolist()
        assert num_images > 0
        per_channel = torch.tensor(flat, dtype=torch.float64).view(3, -1) / num_positions
        mean, square, within = per_channel
        variance = (square - mean.square()).clamp(min=0) + within
        shift = float(mean.mean())
        total = float((variance + (mean - shift).square()).mean())
        return LatentStatistics(
            scaling_factor=total**-0.5 if total > 0 else 1.0,
            shift_factor=shift,
            mean=mean.tolist(),
            std=variance.sqrt().tolist(),
            num_images=int(num_images),
        )


def write_statistics(path: Path, statistics: LatentStatistics, facts: dict[str, Any]) -> None:
    """Write `latents.json`; facts: of which weights and data. Raises OSError."""
    text = json.dumps({**statistics.record(), **facts}, indent=1)
    write_durably(path, (text + "\n").encode())
