"""A mixture of Gaussians over vector latents, as a prior p(z), and its fit by EM.

    p(z) = sum_m pi_m N(z; mu_m, S_m),   S_m diagonal or full

In: latents (N, d), for a prior draws of the aggregate posterior 1/N sum_i q(z|x_i). Out: a
`GaussianMixture`. Everything is float64 on the CPU. The log-likelihood of EM never falls: also the
floor of the variances is the maximum under its constraint (eigenvalues cut off below).

Legend: N latents, d dimensions, M components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vae_dist.randomness import torch_generator

Covariance = Literal["diagonal", "full"]

MAX_ITERATIONS = 500
TOLERANCE_NATS = 1e-5  # per latent and iteration; EM ends when it gains less
LLOYD_ITERATIONS = 20  # of k-means, before EM
FLOOR = 1e-4  # of a variance, part of the mean variance of the latents


@dataclass(frozen=True)
class GaussianMixture:
    log_weights: Tensor  # (M,)
    means: Tensor  # (M, d)
    factors: Tensor  # S_m = L L': the diagonals (M, d) of L, or lower triangular L (M, d, d)

    @property
    def num_components(self) -> int:
        return len(self.log_weights)

    @property
    def covariance(self) -> Covariance:
        return "diagonal" if self.factors.ndim == 2 else "full"

    def to(self, device: torch.device) -> GaussianMixture:
        moved = (self.log_weights, self.means, self.factors)
        return GaussianMixture(*(tensor.to(device) for tensor in moved))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats for latents (N, d), float64 (N,)."""
        return self.log_joint(z).logsumexp(1)

    def log_joint(self, z: Tensor) -> Tensor:
        """log pi_m N(z; mu_m, S_m), float64 (N, M)."""
        z = z.double()
        columns = []
        for mean, factor in zip(self.means, self.factors, strict=True):
            if self.covariance == "diagonal":
                white, scale = (z - mean) / factor, factor
            else:
                white = torch.linalg.solve_triangular(factor, (z - mean).T, upper=False).T
                scale = factor.diagonal()
            columns.append(-0.5 * white.square().sum(1) - scale.log().sum())
        constant = 0.5 * z.shape[1] * math.log(2 * math.pi)
        return torch.stack(columns, 1) + self.log_weights - constant

    def sample(self, noise: Tensor, uniform: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Draws from normal noise (N, d) and uniform draws (N,) in [0, 1), float32 (N, d).

        `temperature` scales the standard deviations of the components, not the distance of their
        means.
        """
        steps = self.log_weights.exp().cumsum(0)
        chosen = torch.searchsorted(steps, uniform.double() * steps[-1], right=True)
        chosen = chosen.clamp(max=self.num_components - 1)
        noise, factors = temperature * noise.double(), self.factors[chosen]
        if self.covariance == "diagonal":
            z = self.means[chosen] + factors * noise
        else:
            z = self.means[chosen] + (factors @ noise.unsqueeze(2)).squeeze(2)
        return z.float()


@dataclass(frozen=True)
class Fit:
    mixture: GaussianMixture
    log_likelihoods: list[float]  # nats per latent, before each iteration and at the end

    @property
    def converged(self) -> bool:
        return len(self.log_likelihoods) <= MAX_ITERATIONS


def fit_mixture(z: Tensor, *, num_components: int, covariance: Covariance, seed: int) -> Fit:
    """The mixture that EM finds for latents (N, d) from a k-means++ start.

    ValueError when there are fewer latents than components, or latents that are not finite.
    """
    z = z.double().cpu()
    if len(z) < num_components:
        raise ValueError(f"{len(z)} latents for {num_components} components")
    if not z.isfinite().all():
        raise ValueError("latents that are not finite")
    floor = FLOOR * max(float(z.var(0, correction=0).mean()), torch.finfo(torch.float32).tiny)
    nearest = _k_means(z, num_components, seed)
    responsibilities = torch.nn.functional.one_hot(nearest, num_components).double()
    mixture = _maximised(z, responsibilities, covariance, floor)
    log_likelihoods: list[float] = []
    for _ in range(MAX_ITERATIONS + 1):
        log_joint = mixture.log_joint(z)
        log_prob = log_joint.logsumexp(1, keepdim=True)
        log_likelihoods.append(float(log_prob.mean()))
        if len(log_likelihoods) > 1 and log_likelihoods[-1] - log_likelihoods[-2] < TOLERANCE_NATS:
            break
        previous = mixture
        mixture = _maximised(z, (log_joint - log_prob).exp(), covariance, floor, previous)
    return Fit(mixture, log_likelihoods)


def _maximised(
    z: Tensor,
    responsibilities: Tensor,
    covariance: Covariance,
    floor: float,
    previous: GaussianMixture | None = None,
) -> GaussianMixture:
    """The M-step: weights, means and covariances of latents (N, d) for responsibilities (N, M)."""
    counts = responsibilities.sum(0)  # (M,)
    is_used = counts > 1e-8
    counts = counts.clamp(min=1e-8)
    means = (responsibilities.T @ z) / counts.unsqueeze(1)
    if covariance == "diagonal":
        variances = torch.stack(
            [
                (weight.unsqueeze(1) * (z - mean).square()).sum(0) / count
                for weight, mean, count in zip(responsibilities.T, means, counts, strict=True)
            ]
        )
        factors = variances.clamp(min=floor).sqrt()
    else:
        factors = torch.stack(
            [
                _factor(_scatter(z - mean, weight) / count, floor)
                for weight, mean, count in zip(responsibilities.T, means, counts, strict=True)
            ]
        )
    mixture = GaussianMixture((counts / counts.sum()).log(), means, factors)
    if previous is not None and not is_used.all():  # nothing to learn from: they stay
        keep = ~is_used
        mixture = replace(mixture, means=means.clone(), factors=factors.clone())
        mixture.means[keep], mixture.factors[keep] = previous.means[keep], previous.factors[keep]
    return mixture


def _scatter(difference: Tensor, weight: Tensor) -> Tensor:
    return difference.T @ (weight.unsqueeze(1) * difference)


def _factor(covariance: Tensor, floor: float) -> Tensor:
    """Cholesky factor of a covariance (d, d) whose eigenvalues are at least `floor`."""
    values, vectors = torch.linalg.eigh(covariance)
    return torch.linalg.cholesky((vectors * values.clamp(min=floor)) @ vectors.T)


def _k_means(z: Tensor, num_centres: int, seed: int) -> Tensor:
    """The nearest of `num_centres` centres of each latent, int64 (N,): k-means++ (Arthur and
    Vassilvitskii 2007), then Lloyd's iterations."""
    generator = torch_generator(seed, "k-means")
    centres = z[torch.randint(len(z), (1,), generator=generator)]
    distances = (z - centres).square().sum(1)
    while len(centres) < num_centres:
        # equal latents only: any of them will do
        odds = distances if float(distances.sum()) > 0 else torch.ones_like(distances)
        steps = odds.cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * steps[-1]
        chosen = torch.searchsorted(steps, draw, right=True).clamp(max=len(z) - 1)
        centres = torch.cat([centres, z[chosen]])
        distances = torch.minimum(distances, (z - z[chosen]).square().sum(1))
    for _ in range(LLOYD_ITERATIONS):
        nearest = torch.cdist(z, centres).argmin(1)
        counts = torch.bincount(nearest, minlength=num_centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, z)
        moved = sums / counts.clamp(min=1).unsqueeze(1)
        centres = torch.where(counts.unsqueeze(1) > 0, moved, centres)
    return torch.cdist(z, centres).argmin(1)
