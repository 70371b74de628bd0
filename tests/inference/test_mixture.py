"""The mixture prior: known mixtures are found; what it is fitted to, when it is fitted again."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.evaluation.test_run import NUM_IMAGES, batches, tiny_model
from tests.support.tiny_run import tiny_config, write_images, write_run
from vae_dist.config.commands import SampleCommand
from vae_dist.config.errors import ConfigError
from vae_dist.inference.load import load_model
from vae_dist.inference.mixture import (
    GaussianMixture,
    aggregate_posterior,
    fit_mixture,
    fitted_prior,
)
from vae_dist.models.latent import prior_latents
from vae_dist.randomness import torch_generator

BOTH = pytest.mark.parametrize("covariance", ["diagonal", "full"])


def known(covariance: str) -> GaussianMixture:
    """Three components in the plane, well apart."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.tensor([[0.0, 0.0], [6.0, 1.0], [-3.0, 7.0]], dtype=torch.float64)
    diagonals = torch.tensor([[1.0, 0.5], [0.3, 0.8], [1.2, 0.4]], dtype=torch.float64)
    factors = torch.diag_embed(diagonals)
    factors[:, 1, 0] = torch.tensor([0.4, -0.6, 0.0])
    return GaussianMixture(weights.log(), means, diagonals if covariance == "diagonal" else factors)


def draws(mixture: GaussianMixture, num: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(num, mixture.means.shape[1], generator=generator)
    return mixture.sample(noise, torch.rand(num, generator=generator))


@BOTH
def test_a_known_mixture_is_found(covariance: str) -> None:
    truth = known(covariance)
    z = draws(truth, 20_000)
    found = fit_mixture(z, 3, covariance, seed=0).mixture
    order = torch.cdist(truth.means, found.means).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert found.factors.shape == truth.factors.shape
    torch.testing.assert_close(
        found.log_weights[order].exp(), truth.log_weights.exp(), atol=0.01, rtol=0
    )
    torch.testing.assert_close(found.means[order], truth.means, atol=0.05, rtol=0)
    torch.testing.assert_close(found.factors[order], truth.factors, atol=0.03, rtol=0)
    # the maximum lies above the truth on the very draws, by little
    gain = float(found.log_prob(z).mean() - truth.log_prob(z).mean())
    assert 0 < gain < 2e-3


@BOTH
def test_the_density_of_one_component_is_the_closed_form(covariance: str) -> None:
    z = draws(known("full"), 500).double()
    mixture = fit_mixture(z, 1, covariance, seed=0).mixture
    centred = z - z.mean(0)
    scatter = centred.T @ centred / 500 + 1e-4 * z.var(0, correction=0).mean() * torch.eye(2)
    if covariance == "diagonal":
        scatter = scatter.diagonal().diag()
    squares = (centred @ torch.linalg.inv(scatter) * centred).sum(1)
    expected = -0.5 * squares - math.log(2 * math.pi) - 0.5 * torch.logdet(scatter)
    torch.testing.assert_close(mixture.log_prob(z), expected)


@BOTH
def test_degenerate_latents_leave_it_finite(covariance: str) -> None:
    mixture = fit_mixture(torch.ones(10, 3), 4, covariance, seed=0).mixture
    assert torch.isfinite(mixture.log_prob(torch.ones(1, 3))).all()
    assert torch.isfinite(draws(mixture, 20)).all()


def test_the_fit_is_a_function_of_latents_and_seed() -> None:
    z = draws(known("full"), 1000)
    fits = [fit_mixture(z, 3, "full", seed=7).mixture for _ in range(2)]
    assert torch.equal(fits[0].means, fits[1].means)


def test_temperature_scales_the_components() -> None:
    mixture = known("diagonal")
    noise, uniform = torch.randn(100, 2), torch.rand(100)
    cold = mixture.sample(noise, uniform, temperature=0.0)
    assert len(cold.unique(dim=0)) == 3
    warm = mixture.sample(noise, uniform)
    half = mixture.sample(noise, uniform, temperature=0.5)
    torch.testing.assert_close(half, (cold + warm) / 2)


def command(run: Path, **keys: object) -> SampleCommand:
    found = SampleCommand(run=str(run), device="cpu", prior="gmm:2")
    for name, value in keys.items():
        setattr(found, name, value)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(1, 256, (40, 8, 8), dtype=np.uint8)
    write_images(tmp_path / "images", pixels)
    config = tiny_config()
    config.data.train = config.data.validation = str(tmp_path / "images")
    write_run(tmp_path / "run", config, (8, 8))
    return tmp_path / "run"


def test_one_draw_of_each_image_whatever_the_batch() -> None:
    model = tiny_model()
    z = aggregate_posterior(model, batches(13), seed=4)
    assert z.shape == (NUM_IMAGES, 3)
    torch.testing.assert_close(aggregate_posterior(model, batches(4), seed=4), z)
    assert not torch.allclose(aggregate_posterior(model, batches(4), seed=5), z)


def test_the_draws_have_the_variance_of_the_posterior() -> None:
    model = tiny_model()
    with torch.no_grad():  # a posterior of known moments
        for parameter in model.encoder.parameters():
            parameter.zero_()
    draws = torch.cat([aggregate_posterior(model, batches(13), seed=seed) for seed in range(60)])
    assert float(draws.mean()) == pytest.approx(0, abs=0.05)
    assert float(draws.var()) == pytest.approx(1, abs=0.05)


def test_what_was_fitted_is_kept_for_what_it_belongs_to(run: Path) -> None:
    loaded = load_model(command(run))
    first = fitted_prior(loaded, command(run))
    assert "kept in" in first.description
    again = fitted_prior(loaded, command(run))
    assert "from" in again.description
    assert torch.equal(again.mixture.means, first.mixture.means)
    # other weights at the same step
    with torch.no_grad():
        next(loaded.model.parameters()).add_(0.1)
    assert "kept in" in fitted_prior(loaded, command(run)).description
    assert "kept in" in fitted_prior(loaded, command(run, prior_images=30)).description
    # a damaged file is replaced
    assert len(list((run / "priors").iterdir())) == 3
    for file in (run / "priors").iterdir():
        file.write_bytes(b"torn")
    assert "kept in" in fitted_prior(loaded, command(run, prior_images=30)).description


def test_a_run_folder_that_cannot_be_written_costs_only_the_file(run: Path) -> None:
    (run / "priors").write_text("in the way")
    fitted = fitted_prior(load_model(command(run)), command(run))
    assert "not kept" in fitted.description


def test_latents_of_a_mixture_are_a_function_of_seed_and_number(run: Path) -> None:
    loaded = load_model(command(run))
    mixture = fitted_prior(loaded, command(run)).mixture
    some = prior_latents((loaded.model.latent_channels,), 7, seed=1, prior=mixture)
    rest = prior_latents((loaded.model.latent_channels,), 4, seed=1, first=3, prior=mixture)
    assert torch.equal(some[3:], rest)
    noise = prior_latents((loaded.model.latent_channels,), 7, seed=1)  # the same, moved
    white = [(z - mean) / factor.diagonal() for z, mean, factor in zip_components(some, mixture)]
    first = torch.stack(white)[:, 0]  # the first row of a triangular factor is its diagonal
    torch.testing.assert_close(first.float(), noise[:, 0], atol=1e-4, rtol=0)


def zip_components(z: torch.Tensor, mixture: GaussianMixture) -> list[tuple[torch.Tensor, ...]]:
    """Each latent with mean and factor of the component that it was drawn from."""
    steps = mixture.log_weights.exp().cumsum(0)
    rows = []
    for index, latent in enumerate(z):
        draw = torch.rand(1, generator=torch_generator(1, "prior-component", index))
        component = int(draw > steps[0])
        rows.append((latent, mixture.means[component], mixture.factors[component]))
    return rows


def test_the_missing_package_is_named_before_images_are_encoded(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    monkeypatch.setattr("vae_dist.inference.mixture.aggregate_posterior", None)
    with pytest.raises(ConfigError, match=r"scikit-learn: pip install 'vae_dist\[metrics\]'"):
        fitted_prior(load_model(command(run)), command(run))
