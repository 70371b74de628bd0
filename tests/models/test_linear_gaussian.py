"""The toy VAE of tests/support against its own closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from tests.support.linear_gaussian import LinearGaussian, linear_gaussian
from vae_dist.randomness import torch_generator

NUM_IMAGES = 6


def log_weights(toy: LinearGaussian, x: Tensor, num_samples: int) -> Tensor:
    """log p(x, z) - log q(z|x) of draws z ~ q, float64 (num_samples, B)."""
    with torch.no_grad():
        mean, log_variance = (moment.double() for moment in toy.model.encode(x))
        noise = torch.randn(
            num_samples, *mean.shape, dtype=torch.float64, generator=torch_generator(0, "test")
        )
        z = mean + (0.5 * log_variance).exp() * noise  # (K, B, L)
        decoded = z @ toy.weight.T + toy.bias  # (K, B, D)
        likelihood = Normal(decoded, toy.model.likelihood.moments(torch.zeros(1))[1].exp().sqrt())
        posterior = Normal(mean, (0.5 * log_variance).exp())
        log_joint = likelihood.log_prob(x.double().flatten(1)).sum(2) + Normal(0, 1).log_prob(
            z
        ).sum(2)
        return log_joint - posterior.log_prob(z).sum(2)


def test_at_the_exact_posterior_each_weight_is_the_evidence() -> None:
    toy = linear_gaussian()
    x = toy.model.likelihood.prepare(toy.images(NUM_IMAGES), None)
    evidence = toy.log_evidence(x).expand(8, -1)
    torch.testing.assert_close(log_weights(toy, x, 8), evidence, rtol=0, atol=1e-5)
    assert toy.elbo_gap_nats == 0.0


@pytest.mark.parametrize("error", [0.5, -0.5])
def test_the_gap_of_the_elbo_is_known(error: float) -> None:
    toy = linear_gaussian(encoder_error=error)
    x = toy.model.likelihood.prepare(toy.images(NUM_IMAGES), None)
    gap = (toy.log_evidence(x) - log_weights(toy, x, 20_000)).mean()
    assert gap.item() == pytest.approx(toy.elbo_gap_nats, abs=0.01)
