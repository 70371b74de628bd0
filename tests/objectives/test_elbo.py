"""Losses as sums over images, on a VAE whose log p(x) is known; gradients of its encoder; beta."""

import pytest
import torch

from tests.support.linear_gaussian import linear_gaussian
from vae_dist.config.schema import ObjectiveConfig
from vae_dist.models.latent import log_ratio_to_prior
from vae_dist.models.vae import VAEOutput
from vae_dist.objectives.elbo import beta_at, log_mean_exp, loss_terms, noise_shape


@pytest.mark.parametrize("beta", [0.0, 0.25, 4.0])
def test_loss_is_distortion_plus_beta_rate_above_the_free_bits(beta):
    kl = torch.tensor([[1.0, 0.2], [0.5, 0.0]], requires_grad=True)  # two groups of latents
    output = VAEOutput(torch.tensor([-3.0, -5.0]), kl, *[torch.empty(2, 0)] * 4)
    charged = 1.0 + 0.5 + 0.5 + 0.5  # of each image's own KL, not of a mean over a minibatch
    for free_bits, rate in ((0.0, 1.7), (0.5, charged)):
        terms = loss_terms(output, ObjectiveConfig(free_bits=free_bits), beta=beta)
        assert torch.stack(terms[1:]).tolist() == pytest.approx([8.0, 1.7, 9.7])
        assert terms.loss_sum.item() == pytest.approx(8.0 + beta * rate)
    terms.loss_sum.backward()
    assert kl.grad[0].tolist() == [beta, 0.0] and kl.grad[1, 1] == 0.0


def test_beta_rises_to_its_value_in_cycles():
    rise, up = [0.0, 0.25, 0.5, 0.75], [1.0] * 4
    for knobs, steps, expected in (
        ({"beta": 0.5}, [0], [0.5]),
        ({"beta": 4.0, "beta_warmup_steps": 10}, [0, 5, 10, 11, 10**6], [0.0, 2.0] + [4.0] * 3),
        ({"beta_warmup_steps": 4, "beta_cycles": 3}, range(40), (rise + up) * 2 + rise + 5 * up),
    ):
        config = ObjectiveConfig(**knobs)
        assert [beta_at(config, step) for step in steps] == pytest.approx(expected)


# several draws of z


def terms_of(toy, x, draws, beta=1.0, doubly=False):
    gradient = "doubly_reparameterized" if doubly else "standard"
    config = ObjectiveConfig(importance_samples=draws, gradient=gradient)
    noise = torch.randn(noise_shape(config, len(x), (3,)))
    return loss_terms(toy.model(x, noise), config, beta=beta)


@pytest.mark.parametrize("error", [0.7, -0.4])
def test_bounds_rise_from_the_elbo_to_the_evidence(error):
    toy = linear_gaussian(encoder_error=error)
    evidence = toy.log_evidence(toy.prepared(4)).mean().item()
    elbo, bounds = evidence - toy.elbo_gap_nats, []
    for draws in (2, 4, 16, 64, 256):
        x = toy.prepared(4).repeat_interleave(max(300, 4000 // draws), 0)
        with torch.no_grad():
            bounds.append(-terms_of(toy, x, draws).neg_bound_sum.item() / len(x))
            one, several = terms_of(toy, x, 1), terms_of(toy, x, draws)
        torch.testing.assert_close(several.rate_sum, one.rate_sum)
        assert float(several.distortion_sum) == pytest.approx(float(one.distortion_sum), rel=0.02)
    assert -one.neg_bound_sum.item() / len(x) == pytest.approx(elbo, abs=0.2)
    assert elbo < bounds[0] < bounds[1] < bounds[2] < bounds[3] < evidence + 0.05
    assert bounds[4] == pytest.approx(evidence, abs=0.05)


def gradients(toy, x, draws, repeats, **knobs):
    """Of each of `repeats` estimates, by log-variances and biases of the encoder (repeats, 6), and
    by biases of the decoder (repeats, 12)."""
    encoder, decoder = toy.model.encoder, toy.model.decoder
    parameters = encoder.log_variance, encoder.bias, decoder.bias
    torch.manual_seed(0)
    losses = (terms_of(toy, x, draws, **knobs).loss_sum for _ in range(repeats))
    found = [torch.cat(torch.autograd.grad(loss, parameters)) for loss in losses]
    return torch.stack(found).split([6, 12], 1)


def test_at_the_exact_posterior_bounds_are_equal_and_one_gradient_is_zero():
    toy = linear_gaussian()
    x = toy.prepared(4)
    evidence = toy.log_evidence(x).sum().item()
    for draws in (2, 50):
        found = terms_of(toy, x, draws)
        assert -found.neg_bound_sum.item() == pytest.approx(evidence, abs=1e-4)
        assert -found.loss_sum.item() == pytest.approx(evidence, abs=1e-4)
    standard, doubly = (gradients(toy, x, 8, 3, doubly=doubly)[0] for doubly in (False, True))
    assert doubly.abs().max() < 1e-2 < standard.abs().max()


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_both_gradients_have_one_expectation_and_the_second_less_variance(beta):
    toy = linear_gaussian(encoder_error=0.5)
    x = toy.prepared(1).expand(32, -1, -1, -1)
    both = [gradients(toy, x, 16, 300, beta=beta, doubly=doubly) for doubly in (False, True)]
    (standard, doubly), decoders = zip(*both, strict=True)
    error = (standard.var(0) / len(standard) + doubly.var(0) / len(doubly)).sqrt()
    assert ((standard.mean(0) - doubly.mean(0)).abs() < 4 * error).all()
    assert (doubly.mean(0).abs() > 5 * error).any()  # there is a gradient to agree on
    assert (doubly.var(0) < 0.5 * standard.var(0)).all()
    torch.testing.assert_close(*decoders)  # of the same draws: the decoder's is one


def test_beta_weighs_the_log_ratio_and_free_bits_are_charged():
    toy = linear_gaussian(encoder_error=0.5)
    x = toy.prepared(4)
    plain, charged = (ObjectiveConfig(importance_samples=4, free_bits=bits) for bits in (0.0, 1.0))
    output = toy.model(x, torch.randn(noise_shape(plain, len(x), (3,))))
    ratio = log_ratio_to_prior(output.z, output.mean, output.log_variance)
    shortfall = (1.0 - output.kl).clamp(min=0).sum()
    assert shortfall > 0.1
    for beta in (0.0, 0.5):
        expected = -log_mean_exp(output.log_likelihood - beta * ratio).sum()
        for config, more in ((plain, 0.0), (charged, beta * shortfall)):
            found = loss_terms(output, config, beta=beta)
            torch.testing.assert_close(found.loss_sum, expected + more)
            torch.testing.assert_close(found[1:], loss_terms(output, plain, beta=1.0)[1:])
