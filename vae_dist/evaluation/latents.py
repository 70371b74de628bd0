"""What a latent is used for: rate and activity of each of its units over a data set.

A unit u is a dimension of a vector latent, a channel of a spatial one. In: means and log-variances
of q(z|x) of each image. Out, with E and Var over images (and positions of a channel):

    KL_u = E[KL(q(z_u|x) || N(0, 1))], nats per image (summed over positions)
    u is active where Var[E[z_u|x]] > 0.01                         (Burda et al. 2016)

Legend: b images, U units, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vae_dist.models.vae import VAE
from vae_dist.runtime import Runtime

ACTIVE_VARIANCE = 0.01


@dataclass(frozen=True)
class LatentReport:
    active_units: int
    active_fraction: float  # of all units
    posterior_variance: float  # mean over images, units and positions; 1 is the prior's
    kl_nats_per_unit: list[float]  # (U,)


class LatentSums:
    """Float64 sums over the images of one rank; `report` adds those of all ranks."""

    def __init__(self, model: VAE, device: torch.device) -> None:
        units = model.latent_channels
        # per unit: KL, mean, mean squared, variance; then positions and images
        self._per_unit = torch.zeros(4, units, dtype=torch.float64, device=device)
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, mean: Tensor, log_variance: Tensor) -> None:
        """mean, log_variance (b, U, *positions) of the images that count."""
        mean = mean.flatten(2) if mean.ndim > 2 else mean.unsqueeze(2)  # (b, U, P)
        log_variance = log_variance.reshape(mean.shape)
        kl = 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance)
        terms = torch.stack([kl, mean, mean.square(), log_variance.exp()]).double()
        self._per_unit += terms.sum((1, 3))
        self._counts += self._counts.new_tensor([mean.shape[0] * mean.shape[2], mean.shape[0]])

    def report(self, runtime: Runtime) -> LatentReport:
        per_unit = runtime.sum_over_ranks(self._per_unit).cpu()
        num_positions, num_images = runtime.sum_over_ranks(self._counts).tolist()
        kl, mean, square, variance = per_unit / max(1.0, num_positions)
        active = int(((square - mean.square()) > ACTIVE_VARIANCE).sum())
        return LatentReport(
            active_units=active,
            active_fraction=active / len(kl),
            posterior_variance=float(variance.mean()),
            kl_nats_per_unit=(kl * num_positions / max(1.0, num_images)).tolist(),
        )
