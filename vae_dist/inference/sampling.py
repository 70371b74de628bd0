"""Images from a trained model: prior samples, reconstructions, interpolations, traversals.

    sample          z = temperature * e,  e ~ N(0, I), or z of a fitted mixture
    reconstruction  z = E[z|x]
    interpolation   z(t) = (1 - t) E[z|a] + t E[z|b]
    traversal       unit u of z set to v (vector latent) or raised by v (channel of a spatial one)
    image           E[x|z]

In: a VAE in eval mode; latents, or stored images (N, C, H, W). Out: float32 images (N, C, H, W) in
[-1, 1] on the CPU. Latent i of the prior is a function of (seed, i), so image i depends neither on
the number of images nor on the batch size. `labels` are int64 (N,), -1 for none; None is -1 for
all. `masks` (N, 1, H, W) are 1 where a pixel was observed; None: everywhere. With `tile` (pixels),
larger images go through the towers in tiles.

Legend: N images, K points of a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vae_dist.evaluation.run import with_noise
from vae_dist.inference import tiles
from vae_dist.models.latent import LatentPrior, prior_latents
from vae_dist.models.vae import NO_LABEL, VAE
from vae_dist.randomness import draws

BATCH_SIZE = 256  # images per forward, unless the caller says otherwise


@torch.inference_mode()
def posteriors(
    model: VAE,
    images: Tensor,
    *,
    batch_size: int = BATCH_SIZE,
    labels: Tensor | None = None,
    masks: Tensor | None = None,
    tile: int = 0,
) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of q(z|x), each float32 (N, *latent) on the model's device, of the very
    images: without the noise that training adds to them."""
    parts = []
    for shown, known, observed in _batches(model, batch_size, images, labels, masks):
        shown = model.likelihood.noise_free(shown)
        parts.append(tiles.encode(model, shown, tile=tile, labels=known, mask=observed))
    means, log_variances = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(log_variances)


@torch.inference_mode()
def decode_means(
    model: VAE,
    z: Tensor,
    image_size: tuple[int, int],
    *,
    batch_size: int = BATCH_SIZE,
    labels: Tensor | None = None,
    tile: int = 0,
) -> Tensor:
    """E[x|z] of latents (N, *latent), for images of (H, W)."""
    images = []
    for latents, known in _batches(model, batch_size, z, labels):
        params = tiles.decode(model, latents, image_size, tile=tile, labels=known)
        images.append(model.likelihood.mean(params).cpu())
    return torch.cat(images)


def reconstruct(
    model: VAE,
    images: Tensor,
    *,
    batch_size: int = BATCH_SIZE,
    labels: Tensor | None = None,
    masks: Tensor | None = None,
    tile: int = 0,
) -> Tensor:
    """E[x | z = E[z|x]] of stored images."""
    mean, _ = posteriors(
        model, images, batch_size=batch_size, labels=labels, masks=masks, tile=tile
    )
    size = images.shape[-2], images.shape[-1]
    return decode_means(model, mean, size, batch_size=batch_size, labels=labels, tile=tile)


@torch.inference_mode()
def neg_elbo(
    model: VAE,
    images: Tensor,
    *,
    seed: int,
    batch_size: int = BATCH_SIZE,
    labels: Tensor | None = None,
) -> Tensor:
    """-ELBO of stored images, float64 (N,) in nats on the CPU, as an evaluation of a data set that
    begins with them draws it."""
    found, numbers = [], torch.arange(len(images))
    latent = model.latent_shape(images.shape[-2], images.shape[-1])
    for stored, known, own in _batches(model, batch_size, images, labels, numbers):
        noise = draws(torch.randn, seed, "eval-posterior", own.tolist(), latent).to(stored.device)
        shown = with_noise(model.likelihood, stored, own.tolist(), seed=seed)
        output = model(shown, noise, known)
        found.append((output.kl.double().sum(1) - output.log_likelihood.double()).cpu())
    return torch.cat(found)


def sample_prior(
    model: VAE,
    num_images: int,
    image_size: tuple[int, int],
    *,
    seed: int,
    temperature: float = 1.0,
    prior: LatentPrior | None = None,
    batch_size: int = BATCH_SIZE,
    labels: Tensor | None = None,
    classes: Sequence[int] = (),
) -> Tensor:
    """Images of `num_images` draws of the prior; with `classes` those of each of them, class by
    class, from the same latents, so that columns of a grid share one."""
    shape = model.latent_shape(*image_size)
    z = prior_latents(shape, num_images, seed=seed, temperature=temperature, prior=prior)
    if classes:
        z = z.repeat(len(classes), *[1] * len(shape))
        labels = torch.tensor(classes).repeat_interleave(num_images)
    return decode_means(model, z, image_size, batch_size=batch_size, labels=labels)


def interpolate(
    model: VAE,
    first: Tensor,
    second: Tensor,
    image_size: tuple[int, int],
    *,
    num_points: int,
    labels: tuple[Tensor, Tensor] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Images on the path from `first` to `second`, both latents (N, *latent), ends included:
    (N * num_points, C, H, W), pair by pair. A point has the label of the nearer end."""
    t = torch.linspace(0, 1, num_points, device=first.device)
    t = t.view(1, -1, *([1] * (first.ndim - 1)))  # (1, K, 1, ...)
    z = (1 - t) * first.unsqueeze(1) + t * second.unsqueeze(1)  # (N, K, *latent)
    nearer = None
    if labels is not None:
        is_first = torch.arange(num_points) < num_points / 2  # (K,)
        nearer = torch.where(is_first, labels[0].unsqueeze(1), labels[1].unsqueeze(1)).flatten()
    return decode_means(model, z.flatten(0, 1), image_size, batch_size=batch_size, labels=nearer)


def traverse(
    model: VAE,
    z: Tensor,
    image_size: tuple[int, int],
    *,
    units: list[int],
    values: Tensor,
    label: int = NO_LABEL,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Images of one latent `z` (*latent) with each of `units` (dimensions of a vector latent,
    channels of a spatial one) moved to each of `values` (K,): (len(units) * K, C, H, W)."""
    moved = z.repeat(len(units), len(values), *([1] * z.ndim))  # (units, K, *latent)
    for row, unit in enumerate(units):
        if z.ndim == 1:
            moved[row, :, unit] = values.to(z)
        else:
            moved[row, :, unit] += values.to(z).view(-1, *([1] * (z.ndim - 1)))
    labels = torch.full((len(units) * len(values),), label)
    return decode_means(
        model, moved.flatten(0, 1), image_size, batch_size=batch_size, labels=labels
    )


def _batches(
    model: VAE, batch_size: int, first: Tensor, *others: Tensor | None
) -> Iterator[tuple[Any, ...]]:
    """Rows of each tensor at once, on the model's device; None stays None."""
    device = next(model.parameters()).device
    for start in range(0, len(first), batch_size):
        part = slice(start, start + batch_size)
        yield tuple(t if t is None else t[part].to(device) for t in (first, *others))
