"""What a latent is used for: rate and activity of each of its units over a data set.

A unit u is a dimension of a vector latent, a channel of a spatial one. In: means and log-variances
of q(z|x) of each image. Out, with E and Var over images (and positions of a channel):

    KL_u = E[KL(q(z_u|x) || N(0, 1))], nats per image (summed over positions)
    u is active where Var[E[z_u|x]] > 0.01                         (Burda et al. 2016)

and what z tells of x, with q(z) the mean of q(z|x) over images (Hoffman and Johnson 2016):

    I(x; z) = E[KL(q(z|x) || p(z))] - KL(q(z) || p(z)) = E[log q(z|x) - log q(z)]
            ~ 1/M sum_i log( q(z_i|x_i) / (1/M sum_j q(z_i|x_j)) ),   z_i ~ q(z|x_i)

over the first M images, the estimate of He et al. (2019) among others. It is InfoNCE with the best
critic there is (Poole et al. 2019): on average at most I, and never above log M = 6.9 nats for
M = 1024. A value at log M says only that each code fits its own image and no other; the rate is a
bound from above.

Legend: b images, U units, P positions, D = U P.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.distributed import Runtime
from vae_dist.models.latent_moments import LatentMoments, LatentStatistics
from vae_dist.models.vae import VAE

ACTIVE_VARIANCE = 0.01
INFORMATION_IMAGES = 1024  # M, fewer where a latent is so large that
INFORMATION_VALUES = 2**20  # M D would be more than this


@dataclass(frozen=True)
class LatentReport:
    active_units: int
    active_fraction: float  # of all units
    posterior_variance: float  # mean over images, units and positions; 1 is the prior's
    mutual_information_nats: float  # estimate from below, at most log of the images it rests on
    kl_nats_per_unit: list[float]  # (U,)


class LatentSums:
    """Float64 sums over the images of one rank; `report` adds those of all ranks."""

    def __init__(self, model: VAE, device: torch.device) -> None:
        units = model.latent_channels
        # per unit: KL, mean, mean squared, variance; then positions and images
        self._per_unit = torch.zeros(4, units, dtype=torch.float64, device=device)
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)
        self._kept: list[_Kept] = []
        self._moments = LatentMoments(units, device)

    def add(self, mean: Tensor, log_variance: Tensor, *, z: Tensor, samples: Sequence[int]) -> None:
        """mean, log_variance, z (b, U, *positions) of the images that count, and their numbers."""
        self._keep_first(torch.stack([mean, log_variance, z], 1), samples)
        self._moments.add(mean, log_variance)
        mean = mean.flatten(2) if mean.ndim > 2 else mean.unsqueeze(2)  # (b, U, P)
        log_variance = log_variance.reshape(mean.shape)
        kl = 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance)
        terms = torch.stack([kl, mean, mean.square(), log_variance.exp()]).double()
        self._per_unit += terms.sum((1, 3))
        self._counts += self._counts.new_tensor([mean.shape[0] * mean.shape[2], mean.shape[0]])

    def _keep_first(self, moments: Tensor, samples: Sequence[int]) -> None:
        """moments (b, 3, U, *positions): those of the first images, for the mutual information."""
        limit = min(INFORMATION_IMAGES, INFORMATION_VALUES // moments[0, 0].numel())
        rows = [row for row, sample in enumerate(samples) if sample < limit]
        if rows:
            self._kept.append(_Kept([samples[row] for row in rows], moments[rows].cpu()))

    def report(self, runtime: Runtime) -> LatentReport:
        per_unit = runtime.sum_over_ranks(self._per_unit).cpu()
        num_positions, num_images = runtime.sum_over_ranks(self._counts).tolist()
        kl, mean, square, variance = per_unit / max(1.0, num_positions)
        active = int(((square - mean.square()) > ACTIVE_VARIANCE).sum())
        return LatentReport(
            active_units=active,
            active_fraction=active / len(kl),
            posterior_variance=float(variance.mean()),
            mutual_information_nats=_information(
                [part for parts in runtime.gather(self._kept) for part in parts]
            ),
            kl_nats_per_unit=(kl * num_positions / max(1.0, num_images)).tolist(),
        )

    def statistics(self, runtime: Runtime) -> LatentStatistics:
        """Mean and spread of z over the images of all ranks, at least one."""
        total = LatentMoments(len(self._per_unit[0]))
        total.add_sums(runtime.sum_over_ranks(self._moments.sums))
        return total.statistics()


class _Kept(NamedTuple):
    samples: list[int]
    moments: Tensor  # (b, 3, U, *positions): mean, log-variance, z


def _information(parts: list[_Kept]) -> float:
    """Of the images that share the most frequent latent shape, in the order of their numbers."""
    by_shape: dict[tuple[int, ...], list[tuple[int, Tensor]]] = defaultdict(list)
    for samples, moments in parts:
        by_shape[tuple(moments.shape[2:])] += zip(samples, moments.flatten(2), strict=True)
    if not by_shape:
        return 0.0
    _, images = max(by_shape.items(), key=lambda item: (len(item[1]), item[0]))
    ordered = torch.stack([moments for _, moments in sorted(images, key=lambda pair: pair[0])])
    return mutual_information_nats(*ordered.unbind(1))


def mutual_information_nats(mean: Tensor, log_variance: Tensor, z: Tensor) -> float:
    """The estimate above for M posteriors and a draw of each, all (M, D)."""
    mean, log_variance, z = mean.double(), log_variance.double(), z.double()
    precision = torch.exp(-log_variance)
    # log q(z_i|x_j) as products of matrices, without the D/2 log 2 pi that cancels: (M, M)
    constant = (log_variance + mean.square() * precision).sum(1)
    log_q = z @ (mean * precision).T - 0.5 * (z.square() @ precision.T + constant)
    log_aggregate = torch.logsumexp(log_q, 1) - math.log(len(z))
    return float((log_q.diagonal() - log_aggregate).mean())
