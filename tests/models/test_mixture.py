"""Mixtures of Gaussians: densities and draws against torch.distributions, EM on known mixtures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from vae_dist.inference.mixture import Covariance, GaussianMixture, fit_mixture

BOTH = pytest.mark.parametrize("covariance", ["diagonal", "full"])


def known(covariance: Covariance) -> GaussianMixture:
    """Three components in the plane, well apart."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.tensor([[0.0, 0.0], [6.0, 1.0], [-3.0, 7.0]], dtype=torch.float64)
    diagonals = torch.tensor([[1.0, 0.5], [0.3, 0.8], [1.2, 0.4]], dtype=torch.float64)
    factors = torch.diag_embed(diagonals)
    factors[:, 1, 0] = torch.tensor([0.4, -0.6, 0.0])
    return GaussianMixture(weights.log(), means, diagonals if covariance == "diagonal" else factors)


def oracle(mixture: GaussianMixture) -> MixtureSameFamily:
    factors = mixture.factors
    if mixture.covariance == "diagonal":
        factors = torch.diag_embed(factors)
    return MixtureSameFamily(
        Categorical(logits=mixture.log_weights),
        MultivariateNormal(mixture.means, scale_tril=factors),
    )


def draws(mixture: GaussianMixture, num: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num, mixture.means.shape[1], generator=generator)
    return mixture.sample(noise, torch.rand(num, generator=generator))


@BOTH
def test_density_is_that_of_torch_distributions(covariance: Covariance) -> None:
    mixture = known(covariance)
    z = 4 * torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    assert mixture.covariance == covariance
    torch.testing.assert_close(mixture.log_prob(z), oracle(mixture).log_prob(z.double()))


@BOTH
def test_draws_have_the_moments_of_the_mixture(covariance: Covariance) -> None:
    mixture = known(covariance)
    z = draws(mixture, 40_000).double()
    expected = oracle(mixture)
    torch.testing.assert_close(z.mean(0), expected.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(z.var(0), expected.variance, atol=0.3, rtol=0.02)
    # entropy: the draws are where the density says
    sampled = expected.sample((40_000,))
    gap = mixture.log_prob(z).mean() - mixture.log_prob(sampled).mean()
    assert abs(float(gap)) < 0.03


@BOTH
def test_em_finds_a_known_mixture(covariance: Covariance) -> None:
    truth = known(covariance)
    z = draws(truth, 20_000)
    fit = fit_mixture(z, num_components=3, covariance=covariance, seed=0)
    assert fit.converged
    order = torch.cdist(truth.means, fit.mixture.means).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    found = [tensor[order] for tensor in (fit.mixture.log_weights.exp(), fit.mixture.means)]
    torch.testing.assert_close(found[0], truth.log_weights.exp(), atol=0.01, rtol=0)
    torch.testing.assert_close(found[1], truth.means, atol=0.05, rtol=0)
    torch.testing.assert_close(fit.mixture.factors[order], truth.factors, atol=0.03, rtol=0)
    # the maximum lies above the truth on the very draws, by little
    gain = fit.log_likelihoods[-1] - float(truth.log_prob(z).mean())
    assert 0 < gain < 1e-3


@BOTH
@pytest.mark.parametrize("seed", range(4))
def test_the_likelihood_never_falls(covariance: Covariance, seed: int) -> None:
    z = torch.randn(300, 5, generator=torch.Generator().manual_seed(seed)).double()
    z[:, 0] = z[:, 0].round()  # clusters without width: the floor is at work
    fit = fit_mixture(z, num_components=6, covariance=covariance, seed=seed)
    values = torch.tensor(fit.log_likelihoods)
    assert len(values) > 3
    assert (values.diff() > -1e-9).all()
    assert values[-1] == pytest.approx(float(fit.mixture.log_prob(z).mean()))


@BOTH
def test_one_component_is_the_closed_form(covariance: Covariance) -> None:
    z = draws(known("full"), 500).double()
    fit = fit_mixture(z, num_components=1, covariance=covariance, seed=0)
    centred = z - z.mean(0)
    scatter = centred.T @ centred / 500
    found = fit.mixture.factors[0]
    if covariance == "diagonal":
        torch.testing.assert_close(found.square(), scatter.diagonal())
    else:
        torch.testing.assert_close(found @ found.T, scatter)
    torch.testing.assert_close(fit.mixture.means[0], z.mean(0))


@BOTH
def test_degenerate_latents_leave_it_finite(covariance: Covariance) -> None:
    same = torch.ones(10, 3)
    fit = fit_mixture(same, num_components=4, covariance=covariance, seed=0)
    assert math.isfinite(fit.log_likelihoods[-1])
    assert torch.isfinite(draws(fit.mixture, 20)).all()


def test_the_fit_is_a_function_of_latents_and_seed() -> None:
    z = draws(known("full"), 300)
    fits = [fit_mixture(z, num_components=3, covariance="full", seed=7) for _ in range(2)]
    assert torch.equal(fits[0].mixture.means, fits[1].mixture.means)


def test_temperature_scales_the_components() -> None:
    mixture = known("diagonal")
    noise, uniform = torch.randn(100, 2), torch.rand(100)
    cold = mixture.sample(noise, uniform, temperature=0.0)
    assert len(cold.unique(dim=0)) == 3
    warm = mixture.sample(noise, uniform)
    half = mixture.sample(noise, uniform, temperature=0.5)
    torch.testing.assert_close(half, (cold + warm) / 2)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="2 latents for 3 components"):
        fit_mixture(torch.zeros(2, 2), num_components=3, covariance="full", seed=0)
    with pytest.raises(ValueError, match="not finite"):
        fit_mixture(torch.full((5, 2), torch.nan), num_components=3, covariance="full", seed=0)
