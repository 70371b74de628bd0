"""The bound under another prior than N(0, I), from the very draw that the ELBO used.

    -ELBO = distortion + rate,   rate = log q(z|x) - log p(z),   z ~ q(z|x)

For a mixture the expectation has no closed form: one draw per image, unbiased.
"""

from __future__ import annotations

import math

import torch

from vae_dist.distributed import Runtime
from vae_dist.evaluation.importance import LatentPrior
from vae_dist.evaluation.meter import Report, Seen, mean_and_error
from vae_dist.models import posterior


class PriorMeter:
    """`neg_elbo_NAME_nats` and `rate_NAME_nats`."""

    def __init__(self, name: str, prior: LatentPrior, device: torch.device) -> None:
        self._name, self._prior = name, prior
        # rate, -ELBO, its square, images
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, seen: Seen) -> None:
        output = seen.output
        z = posterior.sample(output.mean, output.log_variance, seen.noise)
        squares = (
            seen.noise.double().square() + output.log_variance.double() + math.log(2 * math.pi)
        )
        log_q = -0.5 * squares.flatten(1).sum(1)
        rate = log_q - self._prior.log_prob(z)
        neg_elbo = rate - output.log_likelihood.double()
        per_image = [rate, neg_elbo, neg_elbo.square(), torch.ones_like(rate)]
        self._sums += torch.stack(per_image).sum(1)

    def report(self, runtime: Runtime) -> Report:
        rate, neg_elbo, squares, num_images = runtime.sum_over_ranks(self._sums).tolist()
        mean, error = mean_and_error(neg_elbo, squares, num_images)
        return Report(
            {
                f"neg_elbo_{self._name}_nats": mean,
                f"neg_elbo_{self._name}_se_nats": error,
                f"rate_{self._name}_nats": rate / num_images,
            }
        )
