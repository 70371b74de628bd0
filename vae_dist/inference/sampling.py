"""Images from a trained model: prior samples and reconstructions.

    sample          z = temperature * e,  e ~ N(0, I);   image = E[x|z]
    reconstruction  z = E[z|x];                          image = E[x|z]

In: a VAE in eval mode, and for reconstructions uint8 images (N, C, H, W). Out: uint8 images
(N, C, H, W) on CPU. Latent i is a function of (seed, i), so image i does not depend on how many
others are drawn, nor on the batch size. The forward is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator
from vae_dist.tracking.images import to_uint8


def prior_latents(
    model: VAE,
    num_images: int,
    image_size: tuple[int, int],
    *,
    seed: int,
    first: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """Latents first, ..., first + num_images - 1 of the prior, float32 (N, *latent) on CPU.

    ValueError when the model cannot make images of this (H, W).
    """
    shape = model.latent_shape(*image_size)
    draws = [
        torch.randn(shape, generator=torch_generator(seed, "prior", index))
        for index in range(first, first + num_images)
    ]
    return temperature * torch.stack(draws)


@torch.inference_mode()
def sample_prior(
    model: VAE,
    num_images: int,
    image_size: tuple[int, int],
    *,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = 256,
) -> Tensor:
    """The means of p(x|z) for `num_images` draws of the prior, uint8 (N, C, H, W)."""
    device = next(model.parameters()).device
    images = []
    for first in range(0, num_images, batch_size):
        z = prior_latents(
            model,
            min(batch_size, num_images - first),
            image_size,
            seed=seed,
            first=first,
            temperature=temperature,
        )
        params = model.decode(z.to(device), image_size)
        images.append(to_uint8(model.likelihood.mean(params)).cpu())
    return torch.cat(images)


@torch.inference_mode()
def reconstruct(model: VAE, images_u8: Tensor, *, seed: int, batch_size: int = 256) -> Tensor:
    """The means of p(x|z) at z = E[z|x] for uint8 images (N, C, H, W).

    Where training adds noise to the images (binarisation, dequantisation), so does this: image i
    gets that of (seed, i).
    """
    mean, _ = posteriors(model, images_u8, seed=seed, batch_size=batch_size)
    height, width = images_u8.shape[-2:]
    return decode_means(model, mean, (height, width), batch_size=batch_size)


@torch.inference_mode()
def posteriors(
    model: VAE, images_u8: Tensor, *, seed: int, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of q(z|x) for uint8 images (N, C, H, W), each float32 (N, *latent) on
    the model's device; the images get the noise that `reconstruct` gives them."""
    device = next(model.parameters()).device
    means, log_variances = [], []
    for first in range(0, len(images_u8), batch_size):
        batch = images_u8[first : first + batch_size]
        uniform = None
        if model.likelihood.needs_uniform:
            uniform = _levels_noise(batch, first, seed).to(device)
        mean, log_variance = model.encode(model.likelihood.prepare(batch.to(device), uniform))
        means.append(mean)
        log_variances.append(log_variance)
    return torch.cat(means), torch.cat(log_variances)


@torch.inference_mode()
def decode_means(
    model: VAE, z: Tensor, image_size: tuple[int, int], *, batch_size: int = 256
) -> Tensor:
    """The means of p(x|z) for latents (N, *latent), uint8 (N, C, H, W) on CPU."""
    images = []
    for part in z.split(batch_size):
        params = model.decode(part, image_size)
        images.append(to_uint8(model.likelihood.mean(params)).cpu())
    return torch.cat(images)


def _levels_noise(batch: Tensor, first: int, seed: int) -> Tensor:
    """Uniform draws in [0, 1) for the images first, first + 1, ..., of the shape of `batch`."""
    return torch.stack(
        [
            torch.rand(image.shape, generator=torch_generator(seed, "eval-levels", first + index))
            for index, image in enumerate(batch)
        ]
    )
