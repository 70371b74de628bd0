"""The importance-weighted bound of K draws z_k ~ q(z|x) (Burda et al. 2016), nats.

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
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vae_dist.models.latent import log_ratio_to_prior
from vae_dist.models.vae import VAEOutput


def importance_bound(
    output: VAEOutput, *, beta: float | Tensor, doubly_reparameterized: bool = False
) -> tuple[Tensor, Tensor]:
    """The bound of each image (B,) for `output` of K draws of z, and, without gradient, that of
    beta = 1. With `doubly_reparameterized`, call it once per forward and before backward: it hooks
    the gradient of z."""
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
