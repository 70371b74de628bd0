"""What is minimised: the negative bound of a microbatch, as sums over its images.

    loss = distortion + beta * charged rate
    distortion = -log p(x|z),   rate = KL(q(z|x) || p(z)),   charged rate = sum_u max(KL_u, free)

or, with several draws of z, the importance-weighted bound. Free bits (Kingma et al. 2016): the
first `free` nats of each unit u of the latent (a dimension of a vector, a channel of a spatial
latent with all its positions) cost nothing. The paper clamps the mean over a minibatch; here it is
each image's own KL, which does not depend on the other images.

Nats, summed and not averaged: the caller divides by the batch size of the whole step.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vae_dist.config.schema import ObjectiveConfig
from vae_dist.models.vae import VAEOutput
from vae_dist.objectives.importance import importance_bound


class LossTerms(NamedTuple):
    """Sums over the images of a microbatch, nats, 0-dim float32. All but the first are reported as
    they are, without beta and free bits."""

    loss_sum: Tensor
    distortion_sum: Tensor  # of a mean draw of z, where there are several
    rate_sum: Tensor
    neg_bound_sum: Tensor  # what -log p(x) is at most: -ELBO, or the importance-weighted one


def noise_shape(
    config: ObjectiveConfig, num_images: int, latent: tuple[int, ...]
) -> tuple[int, ...]:
    """Of the noise that the forward of `num_images` images is given."""
    draws = () if config.importance_samples == 1 else (config.importance_samples,)
    return (num_images, *draws, *latent)


def loss_terms(
    output: VAEOutput,
    config: ObjectiveConfig,
    *,
    beta: float | Tensor,
    half_size: Tensor | None = None,
) -> LossTerms:
    """Of a forward on noise of `noise_shape`; `half_size` is its second output, log p (B,)."""
    if config.importance_samples > 1:
        doubly = config.gradient == "doubly_reparameterized"
        free = config.free_bits
        return importance_terms(output, beta=beta, free_bits=free, doubly_reparameterized=doubly)
    terms = elbo_terms(output, beta=beta, free_bits=config.free_bits)
    if half_size is None:
        return terms
    distortion = -half_size.sum()
    return terms._replace(loss_sum=terms.loss_sum + config.scale_equivariance * distortion)


def elbo_terms(output: VAEOutput, *, beta: float | Tensor, free_bits: float = 0.0) -> LossTerms:
    """`output` of one draw of z per image."""
    distortion_sum = -output.log_likelihood.sum()
    rate_sum = output.kl.sum()
    charged = rate_sum + free_bits_charge(output.kl, free_bits=free_bits) if free_bits else rate_sum
    return LossTerms(
        distortion_sum + beta * charged, distortion_sum, rate_sum, distortion_sum + rate_sum
    )


def importance_terms(
    output: VAEOutput,
    *,
    beta: float | Tensor,
    free_bits: float = 0.0,
    doubly_reparameterized: bool = False,
) -> LossTerms:
    """`output` of K draws of z per image; free bits are charged on the closed-form KL."""
    bound, reported = importance_bound(
        output, beta=beta, doubly_reparameterized=doubly_reparameterized
    )
    loss = -bound.sum()
    if free_bits:
        loss = loss + beta * free_bits_charge(output.kl, free_bits=free_bits)
    distortion_sum = -output.log_likelihood.detach().mean(1).sum()
    return LossTerms(loss, distortion_sum, output.kl.detach().sum(), -reported.sum())


def free_bits_charge(kl: Tensor, *, free_bits: float) -> Tensor:
    """sum of max(KL_u, free) - KL_u over images and units: it takes the gradient from those units
    whose KL (B, U) is below."""
    return (free_bits - kl).clamp(min=0.0).sum()
