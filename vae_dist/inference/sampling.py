"""Images from a trained model: prior samples and reconstructions.

    sample          z = temperature * e,  e ~ N(0, I), or z of a fitted mixture;  image = E[x|z]
    reconstruction  z = E[z|x];                          image = E[x|z]

In: a VAE in eval mode, and for reconstructions uint8 images (N, C, H, W). Out: uint8 images
(N, C, H, W) on CPU. Latent i is a function of (seed, i), so image i does not depend on how many
others are drawn, nor on the batch size. The forward is float32. `labels`, int64 (N,) with -1 for
none, are what a conditional model is told; None is -1 for all. `masks` (N, 1, H, W) are 1 where a
pixel was observed; None: everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vae_dist.inference import tiles
from vae_dist.models.latent import LatentPrior, prior_latents
from vae_dist.models.vae import VAE
from vae_dist.tracking.images import to_uint8


@torch.inference_mode()
def sample_prior(
    model: VAE,
    num_images: int,
    image_size: tuple[int, int],
    *,
    seed: int,
    temperature: float = 1.0,
    prior: LatentPrior | None = None,
    batch_size: int = 256,
    labels: Tensor | None = None,
) -> Tensor:
    """The means of p(x|z) for `num_images` draws of the prior, uint8 (N, C, H, W)."""
    device = next(model.parameters()).device
    images = []
    for first in range(0, num_images, batch_size):
        z = prior_latents(
            model.latent_shape(*image_size),
            min(batch_size, num_images - first),
            seed=seed,
            first=first,
            temperature=temperature,
            prior=prior,
        )
        told = _part(labels, first, len(z), device)
        params = model.decode(z.to(device), image_size, told)
        images.append(to_uint8(model.likelihood.mean(params)).cpu())
    return torch.cat(images)


def sample_classes(
    model: VAE,
    classes: Sequence[int],
    num_images: int,
    image_size: tuple[int, int],
    *,
    seed: int,
    temperature: float = 1.0,
    prior: LatentPrior | None = None,
    batch_size: int = 256,
) -> Tensor:
    """`num_images` samples of each class, uint8 (len(classes) * num_images, C, H, W), class by
    class; image i of each class has the latent of prior sample i, so columns share it."""
    latent = model.latent_shape(*image_size)
    z = prior_latents(latent, num_images, seed=seed, temperature=temperature, prior=prior)
    z = z.to(next(model.parameters()).device).repeat(len(classes), *[1] * (z.ndim - 1))
    labels = torch.tensor(classes).repeat_interleave(num_images)
    return decode_means(model, z, image_size, batch_size=batch_size, labels=labels)


@torch.inference_mode()
def reconstruct(
    model: VAE,
    images_u8: Tensor,
    *,
    batch_size: int = 256,
    labels: Tensor | None = None,
    masks: Tensor | None = None,
    tile: int = 0,
) -> Tensor:
    """The means of p(x|z) at z = E[z|x] for uint8 images (N, C, H, W).

    With `tile` (pixels), images that are larger go through in tiles.
    """
    mean, _ = posteriors(
        model, images_u8, batch_size=batch_size, labels=labels, masks=masks, tile=tile
    )
    height, width = images_u8.shape[-2:]
    return decode_means(
        model, mean, (height, width), batch_size=batch_size, labels=labels, tile=tile
    )


@torch.inference_mode()
def posteriors(
    model: VAE,
    images_u8: Tensor,
    *,
    batch_size: int = 256,
    labels: Tensor | None = None,
    masks: Tensor | None = None,
    tile: int = 0,
) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of q(z|x) for uint8 images (N, C, H, W), each float32 (N, *latent) on
    the model's device. The images get none of the noise that training adds to them."""
    device = next(model.parameters()).device
    means, log_variances = [], []
    for first in range(0, len(images_u8), batch_size):
        batch = images_u8[first : first + batch_size]
        prepared = model.likelihood.noise_free(batch.to(device))
        told = _part(labels, first, len(batch), device)
        mask = _part(masks, first, len(batch), device)
        if tile:
            mean, log_variance = tiles.encode(model, prepared, tile=tile, labels=told, mask=mask)
        else:
            mean, log_variance = model.encode(prepared, told, mask)
        means.append(mean)
        log_variances.append(log_variance)
    return torch.cat(means), torch.cat(log_variances)


@torch.inference_mode()
def decode_means(
    model: VAE,
    z: Tensor,
    image_size: tuple[int, int],
    *,
    batch_size: int = 256,
    labels: Tensor | None = None,
    tile: int = 0,
) -> Tensor:
    """The means of p(x|z) for latents (N, *latent), uint8 (N, C, H, W) on CPU."""
    images = []
    for first in range(0, len(z), batch_size):
        part = z[first : first + batch_size]
        told = _part(labels, first, len(part), part.device)
        if tile:
            params = tiles.decode(model, part, image_size, tile=tile, labels=told)
        else:
            params = model.decode(part, image_size, told)
        images.append(to_uint8(model.likelihood.mean(params)).cpu())
    return torch.cat(images)


def _part(tensor: Tensor | None, first: int, count: int, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor[first : first + count].to(device)
