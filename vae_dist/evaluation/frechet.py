"""The Frechet inception distance of reconstructions (rFID) and of samples of the prior (FID).

    d^2 = |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

between Gaussians of the mean and covariance of features (Heusel et al. 2017). Moments are sums of
f and f f' in float64, added over ranks, so they are those of all images together, exactly. The
distance is biased upwards for few images: published figures rest on 50,000.

What is compared are pictures: 8-bit images, and means of p(x|z) rounded to 8 bits; grey ones are
repeated in three channels. Samples are those that `sample` draws with the same seed, as many as
there are images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vae_dist.distributed import Runtime
from vae_dist.evaluation.metrics import EvaluatedBatch, Report, in_colour
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.latent import LatentPrior, drawn_labels
from vae_dist.models.vae import VAE
from vae_dist.tracking.images import to_uint8

IMAGES_AT_ONCE = 64  # through the feature network
FEW_IMAGES = 10_000

# images (b, 3, H, W) in [0, 1] -> (b, F)
Features = Callable[[Tensor], Tensor]


class Moments:
    """Float64 sums of features and of their products over the images of one rank."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self._products = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        features = features.double()
        self._count += len(features)
        self._sum += features.sum(0)
        self._products += features.T @ features

    def pooled(self, runtime: Runtime) -> tuple[int, Tensor, Tensor]:
        """Count, mean and covariance (divided by count - 1) over all ranks, on the CPU."""
        count = runtime.sum_over_ranks(self._count).item()
        mean = runtime.sum_over_ranks(self._sum).cpu() / count
        products = runtime.sum_over_ranks(self._products).cpu()
        covariance = (products - count * torch.outer(mean, mean)) / max(1.0, count - 1)
        return int(count), mean, covariance


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """d^2 of two Gaussians, float64 (F,) and (F, F); covariances may be singular."""
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # (S_1 S_2)^(1/2) has the trace of (S_1^(1/2) S_2 S_1^(1/2))^(1/2), which is symmetric
    eigenvalues = torch.linalg.eigvalsh(root @ cov_2 @ root)
    trace = cov_1.trace() + cov_2.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    return max(0.0, float((mean_1 - mean_2).square().sum() + trace))


class FrechetMetric:
    """`rfid`, and of each prior in `priors` (None: N(0, I)) `fid` with its name in it."""

    def __init__(
        self,
        features: Features,
        num_features: int,
        model: VAE,
        device: torch.device,
        *,
        of_reconstructions: bool,
        priors: Mapping[str, LatentPrior | None],
        seed: int,
    ) -> None:
        self._features, self._num_features, self._device = features, num_features, device
        self._model, self._priors, self._seed = model, priors, seed
        self._images = Moments(num_features, device)
        self._reconstructions = Moments(num_features, device) if of_reconstructions else None
        self._sizes: set[tuple[int, int]] = set()

    def update(self, batch: EvaluatedBatch) -> None:
        images, reconstructions = batch.pictures
        self._sizes.add(batch.inputs.image_size)
        self._add(self._images, images)
        if self._reconstructions is not None:
            self._add(self._reconstructions, reconstructions)

    def compute(self, runtime: Runtime) -> Report:
        report = Report()
        count, *images = self._images.pooled(runtime)
        if self._reconstructions is not None:
            _, *reconstructions = self._reconstructions.pooled(runtime)
            report.figures["rfid"] = frechet_distance(*images, *reconstructions)
        sizes = set().union(*runtime.gather(self._sizes))
        for name, prior in self._priors.items():
            if len(sizes) > 1:
                report.notes[name] = f"{name} is left out: the images have {len(sizes)} sizes"
                continue
            _, *samples = self._samples(count, next(iter(sizes)), prior, runtime).pooled(runtime)
            report.figures[name] = frechet_distance(*images, *samples)
        if count < FEW_IMAGES and report.figures:
            names = " and ".join(report.figures)
            report.notes["frechet"] = (
                f"{names} of {count} images: biased upwards, and by more than differences between "
                "models; compare with figures of as many images only"
            )
        return report

    def _samples(
        self, num_images: int, size: tuple[int, int], prior: LatentPrior | None, runtime: Runtime
    ) -> Moments:
        """This rank's share of the moments of `num_images` samples."""
        moments = Moments(self._num_features, self._device)
        seed, share = self._seed, -(-num_images // runtime.world)
        stop = min((runtime.rank + 1) * share, num_images)
        for first in range(runtime.rank * share, stop, IMAGES_AT_ONCE):
            count = min(IMAGES_AT_ONCE, stop - first)
            labels = drawn_labels(self._model.num_classes, count, seed=seed, first=first)
            images = BatchedVAE(self._model).sample(
                count, size, seed=seed, first=first, prior=prior, labels=labels
            )
            self._add(moments, to_uint8(images).float().to(self._device) / 255)
        return moments

    def _add(self, moments: Moments, images: Tensor) -> None:
        for part in images.split(IMAGES_AT_ONCE):
            moments.add(self._features(in_colour(part)))
