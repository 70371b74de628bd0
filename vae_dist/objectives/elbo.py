"""What is minimised: the negative bound of a microbatch, as sums over its images.

    loss = distortion + beta * charged rate
    distortion = -log p(x|z),   rate = KL(q(z|x) || p(z)),   charged rate = sum_u max(KL_u, free)

Free bits (Kingma et al. 2016): the first `free` nats of each unit u of the latent (a dimension of a
vector, a channel of a spatial latent with all its positions) cost nothing. The paper clamps the
mean over a minibatch; here it is each image's own KL, which does not depend on the other images.
With K draws z_k ~ q(z|x), the importance-weighted bound (Burda et al. 2016) takes the place:

    bound = E[log 1/K sum_k w_k],   w_k = p(x|z_k) (p(z_k) / q(z_k|x))^beta

With beta = 1 it is at most log p(x), at least the ELBO, and rises with K; in a warm-up beta weighs
the log-ratio as it does the KL of the ELBO. With u_k = w_k / sum w, the two gradients:

    standard                  sum_k u_k d log w_k
    doubly_reparameterized    decoder: the same; encoder:
                              sum_k u_k (1 - beta + beta u_k) (d log w_k / d z_k) (d z_k)
                              with the moments of q held fixed in log w: u_k^2 where beta = 1
                              (Tucker et al. 2019); q stands in w_k with the power -beta

Both have the same expectation. The first one's signal-to-noise ratio for the encoder falls with K
(Rainforth et al. 2018), the second one's rises.

beta is `objective.beta` times r: in `beta_cycles` cycles (Fu et al. 2019) r rises from 0 to 1 in
`beta_warmup_steps` and stays up as long before it starts again; after the last rise it stays.

Nats, summed and not averaged: the caller divides by the batch size of the whole step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.config.schema import ObjectiveConfig
from vae_dist.models.latent import log_ratio_to_prior
from vae_dist.models.vae import VAEOutput


class LossTerms(NamedTuple):
    """Sums over the images of a microbatch, nats, 0-dim float32. All but the first are reported as
    they are, without beta and free bits."""

    loss_sum: Tensor
    distortion_sum: Tensor  # of a mean draw of z, where there are several
    rate_sum: Tensor
    neg_bound_sum: Tensor  # what -log p(x) is at most: -ELBO, or the importance-weighted one


def beta_at(config: ObjectiveConfig, step: int) -> float:
    """At step `step`, from 0: no state, exact at a resume."""
    warmup = config.beta_warmup_steps
    last_rise = 2 * warmup * (config.beta_cycles - 1)  # the step that it begins with
    since = step - last_rise if step >= last_rise else step % (2 * warmup)
    if since >= warmup:
        return config.beta
    return config.beta * since / warmup


def noise_shape(
    config: ObjectiveConfig, num_images: int, latent: tuple[int, ...]
) -> tuple[int, ...]:
    """Of the noise that the forward of `num_images` images is given."""
    draws = () if config.importance_samples == 1 else (config.importance_samples,)
    return (num_images, *draws, *latent)


def loss_terms(
    output: VAEOutput, config: ObjectiveConfig, *, beta: float, half_size: Tensor | None = None
) -> LossTerms:
    """Of a forward on noise of `noise_shape`; `half_size` is its second output, log p (B,). Call it
    once per forward and before backward: it may hook the gradient of z."""
    rate_sum = output.kl.sum()
    # the gradient of units whose closed-form KL (B, U) is below goes
    charge = (config.free_bits - output.kl).clamp(min=0.0).sum() if config.free_bits else 0.0
    if config.importance_samples > 1:
        doubly = config.gradient == "doubly_reparameterized"
        bound, reported = importance_bound(output, beta=beta, doubly_reparameterized=doubly)
        distortion_sum = -output.log_likelihood.mean(1).sum()
        return LossTerms(-bound.sum() + beta * charge, distortion_sum, rate_sum, -reported.sum())
    distortion_sum = -output.log_likelihood.sum()
    loss = distortion_sum + beta * (rate_sum + charge)
    if half_size is not None:
        loss = loss + config.scale_equivariance * -half_size.sum()
    return LossTerms(loss, distortion_sum, rate_sum, distortion_sum + rate_sum)


def importance_bound(
    output: VAEOutput, *, beta: float, doubly_reparameterized: bool
) -> tuple[Tensor, Tensor]:
    """The bound of each image (B,) for `output` of K draws of z, and, without gradient, that of
    beta = 1."""
    moments = (output.mean, output.log_variance)
    if doubly_reparameterized:
        moments = (output.mean.detach(), output.log_variance.detach())
    log_ratio = output.log_ratio  # (B, K)
    if log_ratio is None:
        log_ratio = log_ratio_to_prior(output.z, *moments)
    log_weights = output.log_likelihood - beta * log_ratio
    if doubly_reparameterized and output.z.requires_grad:
        # the bound's gradient gives each z_k its u_k; the hook does the rest
        shares = 1 - beta + beta * torch.softmax(log_weights.detach(), 1)
        weigh = shares.reshape(*shares.shape, *([1] * (output.z.ndim - 2)))
        output.z.register_hook(lambda gradient: gradient * weigh)
    with torch.no_grad():
        reported = log_mean_exp(output.log_likelihood - log_ratio)
    return log_mean_exp(log_weights), reported


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """log 1/K sum_k w_k of (B, K), over k."""
    return torch.logsumexp(log_weights, 1) - math.log(log_weights.shape[1])
