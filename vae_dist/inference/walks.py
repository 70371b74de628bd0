"""Walks through the latent space: between two images, and along one unit of the latent.

    interpolation   z(t) = (1 - t) E[z|a] + t E[z|b]
    traversal       unit u of z set to v (vector latent) or raised by v (channel of a spatial one)

In: a VAE in eval mode and latents. Out: uint8 images on CPU. A unit is a dimension of a vector
latent, a channel of a spatial one. `labels` are those of the images; on the way between two of them
a conditional model is told that of the nearer one.

Legend: N images, U units, P positions (1 for a vector latent), K points of a walk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vae_dist.inference.sampling import decode_means
from vae_dist.models.vae import NO_LABEL, VAE


def interpolate(
    model: VAE,
    first: Tensor,
    second: Tensor,
    image_size: tuple[int, int],
    *,
    num_points: int,
    labels: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Images on the way from `first` to `second`, both latents (N, *latent), ends included:
    uint8 (N * num_points, C, H, W), pair by pair."""
    t = torch.linspace(0, 1, num_points, device=first.device)
    t = t.view(1, -1, *([1] * (first.ndim - 1)))  # (1, K, 1, ...)
    z = (1 - t) * first.unsqueeze(1) + t * second.unsqueeze(1)  # (N, K, *latent)
    told = None
    if labels is not None:
        is_nearer = torch.arange(num_points) < num_points / 2  # (K,)
        told = torch.where(is_nearer, labels[0].unsqueeze(1), labels[1].unsqueeze(1)).flatten()
    return decode_means(model, z.flatten(0, 1), image_size, labels=told)


def traverse(
    model: VAE,
    z: Tensor,
    image_size: tuple[int, int],
    *,
    units: list[int],
    values: Tensor,
    label: int = NO_LABEL,
) -> Tensor:
    """Images of one latent `z` (*latent) with each of `units` moved to each of `values` (K,):
    uint8 (len(units) * K, C, H, W), unit by unit."""
    moved = z.repeat(len(units), len(values), *([1] * z.ndim))  # (units, K, *latent)
    for row, unit in enumerate(units):
        if z.ndim == 1:
            moved[row, :, unit] = values.to(z)
        else:
            moved[row, :, unit] += values.to(z).view(-1, *([1] * (z.ndim - 1)))
    z = moved.flatten(0, 1)
    return decode_means(model, z, image_size, labels=torch.full((len(z),), label))
