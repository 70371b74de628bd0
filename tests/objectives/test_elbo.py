"""The loss is a sum over images: parts add up, beta weighs the rate alone."""

from __future__ import annotations

import pytest
import torch

from vae_dist.models.vae import VAEOutput
from vae_dist.objectives.elbo import elbo_terms


def output(log_likelihood: torch.Tensor, kl: torch.Tensor) -> VAEOutput:
    rest = torch.empty(len(log_likelihood), 0)
    return VAEOutput(log_likelihood, kl, rest, rest, rest, rest)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0, 4.0])
def test_loss_is_distortion_plus_beta_rate(beta: float) -> None:
    log_likelihood = torch.tensor([-3.0, -5.0])
    kl = torch.tensor([[1.0, 2.0], [0.5, 0.0]])  # two groups of latents
    terms = elbo_terms(output(log_likelihood, kl), beta=beta)
    assert terms.distortion_sum.item() == 8.0
    assert terms.rate_sum.item() == 3.5
    assert terms.neg_bound_sum.item() == 11.5
    assert terms.loss_sum.item() == 8.0 + beta * 3.5
    assert all(term.shape == () and term.dtype == torch.float32 for term in terms)


def test_free_bits_charge_what_a_unit_has_above_them() -> None:
    log_likelihood = torch.tensor([-3.0, -5.0])
    kl = torch.tensor([[1.0, 0.2], [0.5, 0.0]], requires_grad=True)
    terms = elbo_terms(output(log_likelihood, kl), beta=2.0, free_bits=0.5)
    assert terms.loss_sum.item() == pytest.approx(8.0 + 2.0 * (1.0 + 0.5 + 0.5 + 0.5))
    assert terms.rate_sum.item() == pytest.approx(1.7)  # reported as it is
    assert terms.neg_bound_sum.item() == pytest.approx(9.7)
    terms.loss_sum.backward()
    assert kl.grad is not None
    assert kl.grad.tolist()[0] == [2.0, 0.0] and kl.grad[1, 1] == 0.0
    # an image's charge is its own: no mean over a minibatch, which microbatches would cut
    alone = [
        elbo_terms(output(log_likelihood[i : i + 1], kl[i : i + 1]), beta=2.0, free_bits=0.5)
        for i in range(2)
    ]
    assert sum(t.loss_sum.item() for t in alone) == pytest.approx(terms.loss_sum.item())
