"""Images from a trained model: prior samples, reconstructions, interpolations, traversals.

    sample          z = temperature * e,  e ~ N(0, I), or z of a fitted mixture; of a ladder each
                    group given those above it, with the spread of its prior times temperature
    reconstruction  z = E[z|x]
    interpolation   z(t) = (1 - t) E[z|a] + t E[z|b]; of a ladder in the top level
    traversal       unit u of z set to v (vector latent) or raised by v (channel of a spatial one)
    image           E[x|z]

In: latents, or stored images (N, C, H, W). Out: float32 images (N, C, H, W) in [-1, 1] on the CPU.
Latent i of the prior is a function of (seed, i), so image i depends neither on the number of images
nor on the batch size. `labels` are int64 (N,), -1 for none; None is -1 for all. `masks` (N, 1, H,
W) are 1 where a pixel was observed; None: everywhere.

Legend: N images, K points of a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vae_dist.config.errors import ConfigError
from vae_dist.data.loader import EvaluationBatch
from vae_dist.evaluation.run import forward
from vae_dist.inference import tiles
from vae_dist.models.ladder import LadderVAE
from vae_dist.models.latent import LatentPrior
from vae_dist.models.vae import NO_LABEL, VAE
from vae_dist.randomness import draws

Size = tuple[int, int]  # (H, W) in pixels


@dataclass(frozen=True)
class BatchedVAE:
    """A VAE in eval mode, with `batch_size` images per forward; where `tile` (pixels) is not 0,
    larger images go through it in tiles of about that side."""

    model: VAE
    batch_size: int = 256
    tile: int = 0

    @torch.inference_mode()
    def encode(
        self, images: Tensor, labels: Tensor | None = None, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each float32 (N, *latent) on the model's device, of the
        very images: without the noise that training adds to them."""
        parts = []
        for shown, known, seen in self._batches(images, labels, masks):
            shown = self.model.likelihood.noise_free(shown)
            parts.append(tiles.encode(self.model, shown, tile=self.tile, labels=known, mask=seen))
        means, log_variances = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(log_variances)

    @torch.inference_mode()
    def decode(
        self, z: Tensor, size: Size, labels: Tensor | None = None, *, levels: int | None = None
    ) -> Tensor:
        """E[x|z] of latents (N, *latent); of a ladder those of the top `levels` levels alone."""
        if levels is not None and not 1 <= levels <= self.model.num_levels:
            raise ConfigError(
                f"levels={levels}: this model is a ladder of {self.model.num_levels} levels (0: it "
                "is none); leave it out to decode all of a latent"
            )
        images = []
        for latents, known in self._batches(z, labels):
            if levels is None:
                params = tiles.decode(self.model, latents, size, tile=self.tile, labels=known)
            else:
                params = self.model.decode(latents, size, known, levels)
            images.append(self.model.likelihood.mean(params).cpu())
        return torch.cat(images)

    def reconstruct(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        masks: Tensor | None = None,
        *,
        levels: int | None = None,
    ) -> Tensor:
        """E[x | z = E[z|x]] of stored images; `levels` as of `decode`."""
        mean, _ = self.encode(images, labels, masks)
        return self.decode(mean, (images.shape[-2], images.shape[-1]), labels, levels=levels)

    @torch.inference_mode()
    def sample(
        self,
        num_images: int,
        size: Size,
        *,
        seed: int,
        first: int = 0,
        temperature: float | Sequence[float] = 1.0,
        prior: LatentPrior | None = None,
        labels: Tensor | None = None,
        classes: Sequence[int] = (),
    ) -> Tensor:
        """Images of `num_images` draws of the prior from number `first` on; with `classes` those of
        each of them, class by class, from the same noise, so that columns of a grid share it.
        `temperature`: one, or, of a ladder, one for each level from the top."""
        model, shape, factor = self.model, self.model.latent_shape(*size), 1.0
        if not isinstance(temperature, Sequence):
            factor = 1.0 if model.num_levels else temperature
        elif len(temperature) != model.num_levels:
            raise ConfigError(
                f"temperature has {len(temperature)} values, and this model {model.num_levels} "
                "levels; give one number, or one for each level of a ladder from the top"
            )
        samples = range(first, first + num_images)
        noise = draws(torch.randn, seed, "prior", samples, shape)
        if prior is None:
            z = factor * noise
        else:
            uniform = draws(torch.rand, seed, "prior-component", samples, (1,)).flatten()
            z = prior.sample(noise, uniform, temperature=factor)
        if classes:
            z = z.repeat(len(classes), *[1] * len(shape))
            labels = torch.tensor(classes).repeat_interleave(num_images)
        if isinstance(model, LadderVAE):
            batches = self._batches(z, labels)
            z = torch.cat([model.from_prior(e, size, y, temperature) for e, y in batches])
        return self.decode(z, size, labels)

    def interpolate(
        self,
        first: Tensor,
        second: Tensor,
        size: Size,
        *,
        num_points: int,
        labels: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Images on the path from `first` to `second`, both latents (N, *latent), ends included:
        (N * num_points, C, H, W), pair by pair. A point has the label of the nearer end; the lower
        levels of a ladder are at their prior's means."""
        t = torch.linspace(0, 1, num_points, device=first.device)
        t = t.view(1, -1, *([1] * (first.ndim - 1)))  # (1, K, 1, ...)
        z = (1 - t) * first.unsqueeze(1) + t * second.unsqueeze(1)  # (N, K, *latent)
        nearer = None
        if labels is not None:
            is_first = torch.arange(num_points) < num_points / 2  # (K,)
            nearer = torch.where(is_first, labels[0].unsqueeze(1), labels[1].unsqueeze(1)).flatten()
        levels = 1 if self.model.num_levels else None
        return self.decode(z.flatten(0, 1), size, nearer, levels=levels)

    def traverse(
        self, z: Tensor, size: Size, *, units: list[int], values: Tensor, label: int = NO_LABEL
    ) -> Tensor:
        """Images of one latent `z` (*latent) with each of `units` (dimensions of a vector latent,
        channels of a spatial one) moved to each of `values` (K,): (len(units) * K, C, H, W)."""
        moved = z.repeat(len(units), len(values), *([1] * z.ndim))  # (units, K, *latent)
        for row, unit in enumerate(units):
            if z.ndim == 1:
                moved[row, :, unit] = values.to(z)
            else:
                moved[row, :, unit] += values.to(z).view(-1, *([1] * (z.ndim - 1)))
        moved = moved.flatten(0, 1)
        return self.decode(moved, size, torch.full((len(moved),), label))

    @torch.inference_mode()
    def neg_elbo(self, images: Tensor, labels: Tensor | None = None, *, seed: int) -> Tensor:
        """-ELBO of stored images, float64 (N,) in nats on the CPU, with the draws of an evaluation
        of a data set that begins with them."""
        found, numbers = [], torch.arange(len(images))
        labels = torch.full_like(numbers, NO_LABEL) if labels is None else labels
        for stored, known, own in self._batches(images, labels, numbers):
            batch = EvaluationBatch(stored, known, own, weights=torch.ones(len(own)), skipped=())
            output = forward(self.model, batch, seed=seed, device=stored.device).output
            found.append((output.kl.double().sum(1) - output.log_likelihood.double()).cpu())
        return torch.cat(found)

    def _batches(self, first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Rows of each tensor at once, on the model's device; None stays None."""
        device = next(self.model.parameters()).device
        for start in range(0, len(first), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield tuple(t if t is None else t[part].to(device) for t in (first, *others))
