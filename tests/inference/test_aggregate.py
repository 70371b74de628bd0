"""A prior fitted to the aggregate posterior: what it is fitted to, and when it is fitted again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.test_run import NUM_IMAGES, batches, tiny_model
from tests.support.tiny_run import tiny_config, write_images, write_run
from vae_dist.config.commands import SampleCommand
from vae_dist.inference.aggregate import aggregate_posterior, fitted_prior
from vae_dist.inference.load import load_model
from vae_dist.inference.mixture import GaussianMixture
from vae_dist.models.latent import prior_latents
from vae_dist.randomness import torch_generator


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
    draws = torch.cat([aggregate_posterior(model, batches(13), seed=seed) for seed in range(200)])
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
    (file,) = (run / "priors").iterdir()
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
