"""Draws of the prior p(z), and of labels: draw i is a function of (seed, i) alone.

    z = temperature * e,  e ~ N(0, I), or z of a mixture that was fitted to the latents

So an image does not depend on how many others are drawn, by whom, nor in which batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vae_dist.models.mixture import GaussianMixture
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator


def prior_latents(
    model: VAE,
    num_images: int,
    image_size: tuple[int, int],
    *,
    seed: int,
    first: int = 0,
    temperature: float = 1.0,
    mixture: GaussianMixture | None = None,
) -> Tensor:
    """Latents first, ..., first + num_images - 1 of the prior, float32 (N, *latent) on CPU: of
    N(0, I), or of `mixture` from the same normal noise.

    ValueError when the model cannot make images of this (H, W).
    """
    shape = model.latent_shape(*image_size)
    draws = [
        torch.randn(shape, generator=torch_generator(seed, "prior", index))
        for index in range(first, first + num_images)
    ]
    noise = torch.stack(draws)
    if mixture is None:
        return temperature * noise
    uniform = [
        torch.rand(1, generator=torch_generator(seed, "prior-component", index))
        for index in range(first, first + num_images)
    ]
    return mixture.latents(noise, torch.cat(uniform), temperature=temperature)


def drawn_labels(model: VAE, num_images: int, *, seed: int, first: int = 0) -> Tensor | None:
    """A label for each prior sample of a conditional model, every class as likely as any other;
    that of sample i is a function of (seed, i). None for a model without labels."""
    if not model.num_classes:
        return None
    return torch.tensor(
        [
            int(torch.randint(model.num_classes, (), generator=torch_generator(seed, "label", i)))
            for i in range(first, first + num_images)
        ]
    )
