"""Bounds on a VAE whose log p(x) is known, and the two gradients of its encoder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.linear_gaussian import LinearGaussian, linear_gaussian
from vae_dist.config.schema import ObjectiveConfig
from vae_dist.objectives.elbo import (
    LossTerms,
    elbo_terms,
    importance_terms,
    loss_terms,
    noise_shape,
)
from vae_dist.objectives.importance import log_mean_exp
from vae_dist.randomness import torch_generator

NUM_IMAGES = 4


def prepared(toy: LinearGaussian, num_images: int = NUM_IMAGES) -> Tensor:
    return toy.model.likelihood.prepare(toy.images(num_images), None)


def terms(
    toy: LinearGaussian,
    x: Tensor,
    num_samples: int,
    *,
    seed: int = 0,
    beta: float = 1.0,
    **knobs,
) -> LossTerms:
    noise = torch.randn(len(x), num_samples, 3, generator=torch_generator(seed, "test"))
    return importance_terms(toy.model(x, noise), beta=beta, **knobs)


def mean_bound(toy: LinearGaussian, num_samples: int, *, repeats: int) -> float:
    """E of the bound per image, over `repeats` independent draws of each image."""
    x = prepared(toy).repeat_interleave(repeats, 0)
    with torch.no_grad():
        return -terms(toy, x, num_samples).neg_bound_sum.item() / len(x)


@pytest.mark.parametrize("error", [0.7, -0.4])
def test_bounds_rise_from_the_elbo_to_the_evidence(error: float) -> None:
    toy = linear_gaussian(encoder_error=error)
    evidence = toy.log_evidence(prepared(toy)).mean().item()
    elbo = evidence - toy.elbo_gap_nats
    bounds = [mean_bound(toy, k, repeats=max(300, 4000 // k)) for k in (1, 4, 16, 64, 256)]
    # one draw is the ELBO
    assert bounds[0] == pytest.approx(elbo, abs=0.08)
    assert bounds[0] < bounds[1] < bounds[2] < bounds[3]
    assert bounds[4] == pytest.approx(evidence, abs=0.05)
    assert all(elbo - 0.08 < bound < evidence + 0.05 for bound in bounds)


def test_all_bounds_are_equal_at_the_exact_posterior() -> None:
    toy = linear_gaussian()
    x = prepared(toy)
    evidence = toy.log_evidence(x).sum().item()
    for num_samples in (1, 2, 50):
        found = terms(toy, x, num_samples)
        assert -found.neg_bound_sum.item() == pytest.approx(evidence, abs=1e-4)
        assert -found.loss_sum.item() == pytest.approx(evidence, abs=1e-4)


def test_one_draw_is_the_elbo() -> None:
    """Draw by draw the sampled KL stands for the closed one; in expectation they are equal."""
    toy = linear_gaussian(encoder_error=0.5)
    x = prepared(toy, 2).repeat_interleave(4000, 0)
    noise = torch.randn(len(x), 3, generator=torch_generator(0, "test"))
    with torch.no_grad():
        closed = elbo_terms(toy.model(x, noise), beta=1.0)
        sampled = importance_terms(toy.model(x, noise.unsqueeze(1)), beta=1.0)
    assert sampled.distortion_sum.item() == pytest.approx(closed.distortion_sum.item(), rel=1e-5)
    assert sampled.rate_sum.item() == pytest.approx(closed.rate_sum.item(), rel=1e-5)
    per_image = [t.neg_bound_sum.item() / len(x) for t in (sampled, closed)]
    assert per_image[0] == pytest.approx(per_image[1], abs=0.06)


def encoder_gradients(
    toy: LinearGaussian,
    x: Tensor,
    *,
    num_samples: int,
    repeats: int,
    doubly: bool,
    beta: float = 1.0,
) -> Tensor:
    """The gradient by the encoder's log-variances and biases of each of `repeats` estimates,
    (repeats, 6)."""
    encoder = toy.model.encoder
    found = []
    for seed in range(repeats):
        toy.model.zero_grad(set_to_none=True)
        found_terms = terms(
            toy, x, num_samples, seed=seed, beta=beta, doubly_reparameterized=doubly
        )
        found_terms.loss_sum.backward()
        found.append(torch.cat([encoder.log_variance.grad, encoder.bias.grad]))
    return torch.stack(found)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_both_gradients_have_one_expectation_and_the_second_less_variance(beta: float) -> None:
    toy = linear_gaussian(encoder_error=0.5)
    x = prepared(toy, 1).expand(32, -1, -1, -1)
    standard, doubly = (
        encoder_gradients(toy, x, num_samples=16, repeats=300, doubly=doubly, beta=beta)
        for doubly in (False, True)
    )
    error = (standard.var(0) / len(standard) + doubly.var(0) / len(doubly)).sqrt()
    assert ((standard.mean(0) - doubly.mean(0)).abs() < 4 * error).all()
    assert (doubly.mean(0).abs() > 5 * error).any()  # there is a gradient to agree on
    assert (doubly.var(0) < 0.5 * standard.var(0)).all()


def test_the_decoder_gets_the_same_gradient_from_both() -> None:
    toy = linear_gaussian(encoder_error=0.5)
    x = prepared(toy)
    gradients = []
    for doubly in (False, True):
        toy.model.zero_grad(set_to_none=True)
        terms(toy, x, 8, doubly_reparameterized=doubly).loss_sum.backward()
        gradients.append(toy.model.decoder.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_at_the_exact_posterior_the_doubly_reparameterised_gradient_is_zero() -> None:
    toy = linear_gaussian()
    x = prepared(toy)
    doubly = encoder_gradients(toy, x, num_samples=8, repeats=3, doubly=True)
    standard = encoder_gradients(toy, x, num_samples=8, repeats=3, doubly=False)
    assert doubly.abs().max() < 1e-2 < standard.abs().max()


def test_beta_weighs_the_log_ratio_and_free_bits_are_charged() -> None:
    toy = linear_gaussian(encoder_error=0.5)
    x = prepared(toy)
    noise = torch.randn(len(x), 4, 3, generator=torch_generator(0, "test"))
    output = toy.model(x, noise)
    # beta = 0 leaves the likelihood alone
    alone = importance_terms(output, beta=0.0)
    expected = -log_mean_exp(output.log_likelihood).sum()
    torch.testing.assert_close(alone.loss_sum, expected)
    plain = importance_terms(output, beta=0.5)
    charged = importance_terms(output, beta=0.5, free_bits=1.0)
    lacking = (1.0 - output.kl).clamp(min=0).sum().item()
    assert lacking > 0
    assert (charged.loss_sum - plain.loss_sum).item() == pytest.approx(0.5 * lacking, rel=1e-4)
    assert charged.neg_bound_sum == plain.neg_bound_sum  # reported with beta 1, without free bits


@pytest.mark.parametrize("gradient", ["standard", "doubly_reparameterized"])
def test_images_add_up(gradient: str) -> None:
    config = ObjectiveConfig(importance_samples=4, gradient=gradient, free_bits=0.5)
    toy = linear_gaussian(encoder_error=0.5)
    x = prepared(toy)
    noise = torch.randn(noise_shape(config, len(x), (3,)), generator=torch_generator(0, "test"))
    found = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        toy.model.zero_grad(set_to_none=True)
        sums = torch.zeros(4)
        for part in parts:
            computed = loss_terms(toy.model(x[part], noise[part]), config, beta=0.7)
            computed.loss_sum.backward()
            sums += torch.stack(computed).detach()
        found.append((sums, toy.model.encoder.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1])
    assert math.isfinite(found[0][0].sum().item())
