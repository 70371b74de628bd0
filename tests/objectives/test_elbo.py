"""Losses as sums over images, on a VAE whose log p(x) is known; gradients of its encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.linear_gaussian import LinearGaussian, linear_gaussian
from vae_dist.config.schema import ObjectiveConfig
from vae_dist.models.latent import log_ratio_to_prior
from vae_dist.models.vae import VAEOutput
from vae_dist.objectives.elbo import (
    LossTerms,
    elbo_terms,
    importance_terms,
    loss_terms,
    noise_shape,
)
from vae_dist.objectives.importance import log_mean_exp
from vae_dist.randomness import torch_generator


def output(log_likelihood: Tensor, kl: Tensor) -> VAEOutput:
    rest = torch.empty(len(log_likelihood), 0)
    return VAEOutput(log_likelihood, kl, rest, rest, rest, rest)


@pytest.mark.parametrize("beta", [0.0, 0.25, 4.0])
def test_loss_is_distortion_plus_beta_rate_above_the_free_bits(beta: float) -> None:
    log_likelihood = torch.tensor([-3.0, -5.0])
    kl = torch.tensor([[1.0, 0.2], [0.5, 0.0]], requires_grad=True)  # two groups of latents
    plain = elbo_terms(output(log_likelihood, kl), beta=beta)
    free = elbo_terms(output(log_likelihood, kl), beta=beta, free_bits=0.5)
    charged = 1.0 + 0.5 + 0.5 + 0.5  # of each image's own KL, not of a mean over a minibatch
    for terms, rate in ((plain, 1.7), (free, charged)):
        reported = terms.distortion_sum, terms.rate_sum, terms.neg_bound_sum
        assert torch.stack(reported).tolist() == pytest.approx([8.0, 1.7, 9.7])
        assert terms.loss_sum.item() == pytest.approx(8.0 + beta * rate)
    free.loss_sum.backward()
    assert kl.grad is not None
    assert kl.grad[0].tolist() == [beta, 0.0] and kl.grad[1, 1] == 0.0


# several draws of z


def noise(x: Tensor, num_samples: int, seed: int = 0) -> Tensor:
    return torch.randn(len(x), num_samples, 3, generator=torch_generator(seed, "test"))


def terms(toy: LinearGaussian, x: Tensor, draws: int, seed: int = 0, **knobs: Any) -> LossTerms:
    return importance_terms(toy.model(x, noise(x, draws, seed)), **{"beta": 1.0, **knobs})


@pytest.mark.parametrize("error", [0.7, -0.4])
def test_bounds_rise_from_the_elbo_to_the_evidence(error: float) -> None:
    toy = linear_gaussian(encoder_error=error)
    evidence = toy.log_evidence(toy.prepared(4)).mean().item()
    elbo, bounds = evidence - toy.elbo_gap_nats, []
    for draws in (1, 4, 16, 64, 256):
        x = toy.prepared(4).repeat_interleave(max(300, 4000 // draws), 0)
        with torch.no_grad():
            bounds.append(-terms(toy, x, draws).neg_bound_sum.item() / len(x))
            if draws == 1:  # draw by draw the sampled KL stands for the closed one
                closed = elbo_terms(toy.model(x, noise(x, 1)[:, 0]), beta=1.0)
                found = terms(toy, x, 1)
                assert found.distortion_sum.item() == pytest.approx(closed.distortion_sum.item())
                assert found.rate_sum.item() == pytest.approx(closed.rate_sum.item())
    assert bounds[0] == pytest.approx(elbo, abs=0.08)
    assert bounds[0] < bounds[1] < bounds[2] < bounds[3]
    assert bounds[4] == pytest.approx(evidence, abs=0.05)
    assert all(elbo - 0.08 < bound < evidence + 0.05 for bound in bounds)


def encoder_gradients(
    toy: LinearGaussian, x: Tensor, num_samples: int, repeats: int, **knobs: Any
) -> Tensor:
    """The gradient by the encoder's log-variances and biases of each of `repeats` estimates,
    (repeats, 6)."""
    encoder, found = toy.model.encoder, []
    for seed in range(repeats):
        toy.model.zero_grad(set_to_none=True)
        terms(toy, x, num_samples, seed, **knobs).loss_sum.backward()
        found.append(torch.cat([encoder.log_variance.grad, encoder.bias.grad]))
    return torch.stack(found)


def test_at_the_exact_posterior_bounds_are_equal_and_one_gradient_is_zero() -> None:
    toy = linear_gaussian()
    x = toy.prepared(4)
    evidence = toy.log_evidence(x).sum().item()
    for num_samples in (1, 2, 50):
        found = terms(toy, x, num_samples)
        assert -found.neg_bound_sum.item() == pytest.approx(evidence, abs=1e-4)
        assert -found.loss_sum.item() == pytest.approx(evidence, abs=1e-4)
    standard, doubly = (
        encoder_gradients(toy, x, 8, 3, doubly_reparameterized=doubly) for doubly in (False, True)
    )
    assert doubly.abs().max() < 1e-2 < standard.abs().max()


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_both_gradients_have_one_expectation_and_the_second_less_variance(beta: float) -> None:
    toy = linear_gaussian(encoder_error=0.5)
    x, decoders = toy.prepared(1).expand(32, -1, -1, -1), []
    found = []
    for doubly in (False, True):
        knobs = {"beta": beta, "doubly_reparameterized": doubly}
        found.append(encoder_gradients(toy, x, 16, 300, **knobs))
        decoders.append(toy.model.decoder.weight.grad.clone())
    standard, doubly = found
    error = (standard.var(0) / len(standard) + doubly.var(0) / len(doubly)).sqrt()
    assert ((standard.mean(0) - doubly.mean(0)).abs() < 4 * error).all()
    assert (doubly.mean(0).abs() > 5 * error).any()  # there is a gradient to agree on
    assert (doubly.var(0) < 0.5 * standard.var(0)).all()
    torch.testing.assert_close(*decoders)  # of the same draws: the decoder's is one


def test_beta_weighs_the_log_ratio_and_free_bits_are_charged() -> None:
    toy = linear_gaussian(encoder_error=0.5)
    x = toy.prepared(4)
    output = toy.model(x, noise(x, 4))
    ratio = log_ratio_to_prior(output.z, output.mean, output.log_variance)
    for beta in (0.0, 0.5):
        expected = -log_mean_exp(output.log_likelihood - beta * ratio).sum()
        plain = importance_terms(output, beta=beta)
        torch.testing.assert_close(plain.loss_sum, expected)
        charged = importance_terms(output, beta=beta, free_bits=1.0)
        shortfall = (1.0 - output.kl).clamp(min=0).sum()
        assert shortfall > 0.1
        torch.testing.assert_close(charged.loss_sum, expected + beta * shortfall)
        reported = importance_terms(output, beta=1.0)[1:]
        torch.testing.assert_close((plain[1:], charged[1:]), (reported, reported))


@pytest.mark.parametrize("gradient", ["standard", "doubly_reparameterized"])
def test_images_add_up(gradient: Any) -> None:
    config = ObjectiveConfig(importance_samples=4, gradient=gradient, free_bits=0.5)
    toy = linear_gaussian(encoder_error=0.5)
    x = toy.prepared(4)
    given = torch.randn(noise_shape(config, len(x), (3,)), generator=torch_generator(0, "test"))
    found = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        toy.model.zero_grad(set_to_none=True)
        sums = torch.zeros(4)
        for part in parts:
            computed = loss_terms(toy.model(x[part], given[part]), config, beta=0.7)
            computed.loss_sum.backward()
            sums += torch.stack(computed).detach()
        found.append((sums, toy.model.encoder.weight.grad.clone()))
    torch.testing.assert_close(*found)
    assert torch.isfinite(found[0][0]).all()
