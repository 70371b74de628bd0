"""The negative ELBO of a microbatch, as sums over its images.

    loss = distortion + beta * rate,   distortion = -log p(x|z),   rate = KL(q(z|x) || p(z))

Nats, summed and not averaged: the caller divides by the batch size of the whole step, so that
microbatches and ranks add up to the same gradient however the batch is split.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vae_dist.models.vae import VAEOutput


class LossTerms(NamedTuple):
    """Sums over the images of a microbatch, nats, 0-dim float32."""

    loss_sum: Tensor
    distortion_sum: Tensor
    rate_sum: Tensor


def elbo_terms(output: VAEOutput, *, beta: float | Tensor) -> LossTerms:
    """`beta` weighs the rate in the loss only; distortion and rate are reported as they are."""
    distortion_sum = -output.log_likelihood.sum()
    rate_sum = output.kl.sum()
    return LossTerms(distortion_sum + beta * rate_sum, distortion_sum, rate_sum)
