"""The mixture prior: known mixtures are found; what it is fitted to, when it is fitted again."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from tests.support.evaluated import NUM_IMAGES, batches, tiny_model
from tests.support.tiny_run import random_pixels, run_with_images, tiny_config, write_images
from vae_dist.config.commands import SampleCommand
from vae_dist.inference.load import load_model
from vae_dist.inference.mixture import (
    GaussianMixture,
    aggregate_posterior,
    fit_mixture,
    fitted_prior,
)


def known(covariance):
    """Three components in the plane, well apart."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.tensor([[0.0, 0.0], [6.0, 1.0], [-3.0, 7.0]], dtype=torch.float64)
    diagonals = torch.tensor([[1.0, 0.5], [0.3, 0.8], [1.2, 0.4]], dtype=torch.float64)
    factors = torch.diag_embed(diagonals)
    factors[:, 1, 0] = torch.tensor([0.4, -0.6, 0.0])
    return GaussianMixture(weights.log(), means, diagonals if covariance == "diagonal" else factors)


def draws(mixture, num):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(num, mixture.means.shape[1], generator=generator)
    return mixture.sample(noise, torch.rand(num, generator=generator))


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_known_mixture_is_found(covariance):
    truth = known(covariance)
    z = draws(truth, 20_000)
    found = fit_mixture(z, 3, covariance, seed=0)
    order = torch.cdist(truth.means, found.means).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    for ours, theirs in (
        (found.log_weights[order].exp(), truth.log_weights.exp()),
        (found.means[order], truth.means),
        (found.factors[order], truth.factors),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)
    # the maximum lies above the truth on the very draws, by little
    assert 0 < float(found.log_prob(z).mean() - truth.log_prob(z).mean()) < 2e-3
    one = fit_mixture(z, 1, covariance, seed=0)  # has the moments of z
    scatter = torch.cov(z.double().T, correction=0)
    scatter += 1e-4 * scatter.diagonal().mean() * torch.eye(2)  # the floor of a variance
    if covariance == "diagonal":
        scatter = scatter.diagonal().diag()
    expected = MultivariateNormal(z.double().mean(0), scatter).log_prob(z.double())
    torch.testing.assert_close(one.log_prob(z), expected)
    degenerate = fit_mixture(torch.ones(10, 3), 4, covariance, seed=0)
    assert torch.isfinite(degenerate.log_prob(torch.ones(1, 3))).all()
    assert torch.isfinite(draws(degenerate, 20)).all()


def test_temperature_scales_components_and_not_their_distance():
    mixture, noise, uniform = known("diagonal"), torch.randn(7, 2), torch.rand(7)
    some, half, cold = (mixture.sample(noise, uniform, temperature=t) for t in (1.0, 0.5, 0.0))
    components = [int((mixture.means.float() == z).all(1).nonzero()) for z in cold]
    torch.testing.assert_close(some, cold + mixture.factors[components].float() * noise)
    torch.testing.assert_close(half, (cold + some) / 2)


def test_one_draw_of_each_image_whatever_the_batch():
    model = tiny_model()
    z = aggregate_posterior(model, batches(13), seed=4)
    assert z.shape == (NUM_IMAGES, 3)
    torch.testing.assert_close(aggregate_posterior(model, batches(4), seed=4), z)
    assert not torch.allclose(aggregate_posterior(model, batches(4), seed=5), z)
    for parameter in model.encoder.parameters():  # a posterior of known moments
        parameter.data.zero_()
    z = torch.cat([aggregate_posterior(model, batches(13), seed=seed) for seed in range(60)])
    assert float(z.var()) == pytest.approx(1, abs=0.05)


def test_a_fit_is_kept_for_what_it_belongs_to(tmp_path):
    run = run_with_images(tmp_path, tiny_config(), random_pixels(8, 28, 28))
    command = SampleCommand(run=str(run), device="cpu", prior="gmm:2")
    loaded = load_model(command)
    first = fitted_prior(loaded, command)
    assert "2 Gaussians, full covariance, of the first 8 images" in first.description
    (file,) = (run / "priors").iterdir()
    again, whole = fitted_prior(loaded, command), file.read_bytes()
    assert str(file) in again.description and torch.equal(again.means, first.means)
    for data in (b"torn", whole.replace(b"[2,3]", b"[3,2]")):  # fitted again
        file.write_bytes(data)
        assert torch.equal(fitted_prior(loaded, command).means, first.means)
        assert file.read_bytes() == whole
    command.prior_images = 5
    assert not torch.equal(fitted_prior(loaded, command).means, first.means)
    write_images(tmp_path / "other", random_pixels(16, 28, 28)[8:])
    loaded.config.data.train = f"{tmp_path}/other"
    assert str(run) not in fitted_prior(loaded, command).description
    next(loaded.model.parameters()).data += 0.1  # other weights at the same step
    assert str(run) not in fitted_prior(loaded, command).description
    assert len(list((run / "priors").iterdir())) == 4
