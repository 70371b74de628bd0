"""The Laplace density against torch.distributions, and its bits beside those of the others."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Laplace as TorchLaplace

from vae_dist.config.schema import DataConfig, LikelihoodConfig
from vae_dist.models.likelihoods import Laplace, Likelihood, build_likelihood


def likelihood(kind: str = "laplace", *, bits: int = 8, **knobs: object) -> Likelihood:
    config = LikelihoodConfig(kind=kind, **knobs)  # type: ignore[arg-type]
    return build_likelihood(config, DataConfig(channels=3, bits=bits))


def images_and_params(model: Likelihood) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = 2 * torch.rand(2, 3, 5, 6, generator=generator) - 1
    params = torch.randn(2, model.num_params(3), 5, 6, generator=generator)
    return images, params


@pytest.mark.parametrize("variance", ["fixed", "shared", "per_channel", "per_pixel"])
def test_laplace_is_that_of_torch_distributions(variance: str) -> None:
    model = likelihood(variance=variance, sigma=0.2, min_sigma=0.05)
    assert isinstance(model, Laplace)
    images, params = images_and_params(model)
    floor, initial = 0.05**2, 0.25
    if variance == "fixed":
        deviation = torch.tensor(0.2, dtype=torch.float64)
    elif variance == "per_pixel":
        deviation = (floor + initial * params[:, 3:].double().exp()).sqrt()
    else:
        raw = torch.tensor([-0.1, 0.0, 0.05])[: 1 if variance == "shared" else 3]
        with torch.no_grad():
            model.moments.raw_log_variance.copy_(raw)
        deviation = (floor + initial * (10 * raw.double()).exp()).sqrt().view(-1, 1, 1)
    mean = params[:, :3]
    expected = TorchLaplace(mean.double(), deviation / math.sqrt(2)).log_prob(images.double())
    found = model.log_prob(params, images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.flatten(1).sum(1), rtol=1e-5, atol=1e-3)
    assert torch.equal(model.mean(params), mean.clamp(-1, 1))


def test_the_learned_scale_has_its_optimum_at_the_mean_absolute_error() -> None:
    """The scale is in the gradient: b = mean |x - m|, the maximum-likelihood value, makes it 0."""
    model = likelihood(min_sigma=1e-4)
    images, params = images_and_params(model)
    params = params / 4
    b = (images - params).abs().mean()
    raw = model.moments.raw_log_variance
    with torch.no_grad():
        raw.fill_((math.log(2 * float(b) ** 2) - 2 * math.log(0.5)) / 10)
    model.log_prob(params, images).sum().backward()
    at_optimum = float(raw.grad)
    raw.grad = None
    with torch.no_grad():
        raw.add_(0.1)
    model.log_prob(params, images).sum().backward()
    assert abs(at_optimum) < 1e-3 * abs(float(raw.grad))


def test_bits_agree_with_those_of_a_uniform_and_of_a_discrete_likelihood() -> None:
    """A density on dequantised levels has bits of levels: a wide Laplace, normalised over the 256
    bins, has the mean bits of its bins' probabilities."""
    model = likelihood(variance="fixed", sigma=0.3)
    centers = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16).to(torch.uint8)
    params = torch.full((1, 3, 16, 16), 0.1)
    edges = (torch.arange(257) / 128.0 - 1).double()
    cdf = TorchLaplace(0.1, 0.3 / math.sqrt(2)).cdf(edges)
    expected = float(-torch.log2(cdf.diff()).mean())
    nll = 0.0
    draws = 32
    for i in range(draws):
        uniform = torch.full(centers.shape, (i + 0.5) / draws)
        nll -= float(model.log_prob(params, model.prepare(centers, uniform))) / draws
    assert model.bits_per_dim(nll, centers.numel()) == pytest.approx(expected, abs=1e-3)
    assert model.bits_per_dim(math.log(2.0), 1) == pytest.approx(8.0)
    assert likelihood(bits=32).bits_per_dim(1.0, 1) is None


def test_draws_have_the_moments_of_the_density() -> None:
    model = likelihood(variance="fixed", sigma=0.1)
    generator = torch.Generator().manual_seed(0)
    draws = model.sample(torch.full((1, 3, 200, 200), 0.25), generator)
    assert draws.mean().item() == pytest.approx(0.25, abs=2e-3)
    assert draws.std().item() == pytest.approx(0.1, abs=2e-3)
    # the mean absolute deviation tells it from a normal of the same sigma (0.0798)
    assert (draws - 0.25).abs().mean().item() == pytest.approx(0.1 / math.sqrt(2), abs=1e-3)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_networks_that_compare_pictures_see_no_noise(kind: str) -> None:
    model = likelihood(kind)
    stored = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    prepared = model.prepare(stored, torch.rand(2, 3, 4, 4))
    clean = model.without_noise(stored, prepared)
    torch.testing.assert_close(clean, stored.float() / 127.5 - 1)
    assert not torch.equal(clean, prepared)
