"""The negative ELBO of a microbatch, as sums over its images.

    loss = distortion + beta * charged rate
    distortion = -log p(x|z),   rate = KL(q(z|x) || p(z)),   charged rate = sum_u max(KL_u, free)

Free bits (Kingma et al. 2016): the first `free` nats of each unit u of the latent (a dimension of a
vector, a channel of a spatial latent with all its positions) cost nothing, in each image. The paper
clamps the mean over a minibatch; here it is each image's own KL, so that the loss of an image does
not depend on which others it is processed with.

Nats, summed and not averaged: the caller divides by the batch size of the whole step, so that
microbatches and ranks add up to the same gradient however the batch is split.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vae_dist.models.vae import VAEOutput


class LossTerms(NamedTuple):
    """Sums over the images of a microbatch, nats, 0-dim float32. All but the first are reported as
    they are, without beta and free bits."""

    loss_sum: Tensor
    distortion_sum: Tensor  # of a mean draw of z, where there are several
    rate_sum: Tensor
    neg_bound_sum: Tensor  # what -log p(x) is at most: -ELBO, or the importance-weighted one


def elbo_terms(output: VAEOutput, *, beta: float | Tensor, free_bits: float = 0.0) -> LossTerms:
    """`output` of one draw of z per image."""
    distortion_sum = -output.log_likelihood.sum()
    rate_sum = output.kl.sum()
    charged = rate_sum + free_bits_charge(output.kl, free_bits=free_bits) if free_bits else rate_sum
    return LossTerms(
        distortion_sum + beta * charged, distortion_sum, rate_sum, distortion_sum + rate_sum
    )


def free_bits_charge(kl: Tensor, *, free_bits: float) -> Tensor:
    """sum of max(KL_u, free) - KL_u over images and units: it takes the gradient from those units
    whose KL (B, U) is below."""
    return (free_bits - kl).clamp(min=0.0).sum()
