"""Imputation against the linear-Gaussian model, where E[x_missing | x_observed] is known."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.support.linear_gaussian import IMAGE_SIZE, SIGMA, LinearGaussian, linear_gaussian
from tests.support.tiny_run import tiny_config
from vae_dist.inference.impute import Imputed, _summed, impute
from vae_dist.models.build import build_vae
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator

NUM_IMAGES = 5


class Incomplete(NamedTuple):
    images: Tensor
    mask: Tensor
    samples: list[int]

    def part(self, start: int, stop: int) -> Incomplete:
        part = slice(start, stop)
        return Incomplete(self.images[part], self.mask[part], self.samples[part])


def half_missing(toy: LinearGaussian) -> Incomplete:
    images = toy.model.likelihood.prepare(toy.images(NUM_IMAGES), None)
    mask = torch.ones(NUM_IMAGES, 1, *IMAGE_SIZE, dtype=torch.uint8)
    mask[:, :, :, IMAGE_SIZE[1] // 2 :] = 0
    return Incomplete(images, mask, list(range(NUM_IMAGES)))


def exact(toy: LinearGaussian, incomplete: Incomplete) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of g(z) = W z + b given the observed pixels, float64 (n, D)."""
    observed = incomplete.mask[0].flatten().bool()
    weight, x = toy.weight[observed], incomplete.images.double().flatten(1)[:, observed]
    precision = torch.eye(weight.shape[1], dtype=torch.float64) + weight.T @ weight / SIGMA**2
    covariance = torch.linalg.inv(precision)
    mean_z = (x - toy.bias[observed]) @ weight @ covariance / SIGMA**2  # (n, L)
    variance = torch.einsum("dl,lm,dm->d", toy.weight, covariance, toy.weight)
    return mean_z @ toy.weight.T + toy.bias, variance.sqrt().expand(len(x), -1)


def run(toy: LinearGaussian, incomplete: Incomplete, method: str, **options: int) -> Imputed:
    settings = {"num_samples": 4000, "num_draws": 3, "seed": 0, "chunk": 10_000} | options
    images, mask, numbers = incomplete
    return impute(toy.model, images, mask, numbers=numbers, method=method, **settings)


def test_the_importance_weighted_mean_tends_to_the_conditional_mean() -> None:
    # the encoder misses, but is wide enough for weights that are bounded
    toy = linear_gaussian(encoder_error=1.0)
    incomplete = half_missing(toy)
    mean, deviation = exact(toy, incomplete)
    errors = []
    for num_samples in (40, 40_000):
        found = run(toy, incomplete, "importance", num_samples=num_samples)
        assert (found.effective_samples > 1).all()
        errors.append((found.mean.flatten(1) - mean).abs() / deviation)
    # within five standard errors of an estimate from that many effective samples
    assert (errors[1] < 5 / found.effective_samples.sqrt().unsqueeze(1)).all()
    assert errors[1].mean() < 0.3 * errors[0].mean()
    ratio = found.deviation.flatten(1) / deviation
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=0.1)
    # encoding the image with mid-grey in place of the missing pixels is another thing
    single = run(toy, incomplete, "single", num_draws=2000)
    bias = (single.draws.mean(1).flatten(1) - mean).abs() / deviation
    assert bias.mean() > 10 * errors[1].mean()


def test_draws_have_the_probabilities_of_their_weights() -> None:
    toy = linear_gaussian()
    incomplete = half_missing(toy).part(0, 1)
    mean, deviation = exact(toy, incomplete)
    found = run(toy, incomplete, "importance", num_samples=6000, num_draws=400)
    draws = found.draws[0].flatten(1).double()  # (J, D)
    assert ((draws.mean(0) - mean[0]).abs() < 0.3 * deviation[0]).all()
    ratio = draws.std(0) / deviation[0]
    assert (ratio > 0.7).all() and (ratio < 1.3).all()


def test_pseudo_gibbs_finds_the_conditional_mean_where_the_encoder_is_exact() -> None:
    """For complete images it is, so the chains sample p(z, x_missing | x_obs) exactly."""
    toy = linear_gaussian()
    incomplete = half_missing(toy)
    mean, deviation = exact(toy, incomplete)
    found = run(toy, incomplete, "gibbs", num_samples=150, num_draws=60)
    assert ((found.mean.flatten(1) - mean).abs() < 0.25 * deviation).all()
    ratio = found.deviation.flatten(1) / deviation
    assert (ratio > 0.8).all() and (ratio < 1.2).all()


def test_values_without_weight_count_nothing_wherever_they_stand() -> None:
    """Also where they come first, and all others have weights that exp() alone calls 0."""
    values = torch.arange(8.0).view(1, 4, 2)
    log_weights = torch.tensor([[-torch.inf, -torch.inf, -1000.0, -1000.0]])
    no_draws = torch.zeros(1, 1, 0)
    for order in ([0, 1, 2, 3], [2, 0, 1, 3], [2, 3, 0, 1]):
        parts = [(values[:, i : i + 1], log_weights[:, i : i + 1], no_draws) for i in order]
        found = _summed(parts, torch.zeros(1, 2), 0)
        assert found.mean.tolist() == [[5.0, 6.0]] and found.deviation.tolist() == [[1.0, 1.0]]
        assert found.effective_samples.item() == 2


@pytest.mark.parametrize("method", ["single", "importance", "gibbs"])
def test_neither_batch_nor_chunk_nor_missing_values_matter(method: str) -> None:
    toy = linear_gaussian()
    incomplete = half_missing(toy)
    options = {"num_samples": 70, "num_draws": 3}
    whole = run(toy, incomplete, method, **options)
    broken = torch.where(incomplete.mask > 0, incomplete.images, float("nan"))
    for other, chunk in ((incomplete, 7), (incomplete.part(2, 4), 9), (broken, 10_000)):
        if isinstance(other, Tensor):
            other = incomplete._replace(images=other)
        found = run(toy, other, method, **options, chunk=chunk)
        places = slice(2, 4) if len(other.samples) == 2 else slice(None)
        for one, two in zip(found, whole, strict=True):
            torch.testing.assert_close(one, two[places], rtol=1e-4, atol=1e-5)


def conditional_model() -> VAE:
    config = tiny_config(num_classes=2)
    config.data.mask = "half"
    model = build_vae(config, (8, 8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch_generator(0, "t")))
    return model


@pytest.mark.parametrize("method", ["single", "importance", "gibbs"])
def test_labels_and_masks_reach_the_model(method: str) -> None:
    model = conditional_model()
    images = torch.ones(2, 1, 8, 8)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    mask[:, :, :4] = 1

    def mean(labels: list[int]) -> Tensor:
        options = {"num_samples": 4, "num_draws": 2, "seed": 0, "numbers": [0, 0]}
        return impute(
            model, images, mask, labels=torch.tensor(labels), method=method, **options
        ).mean

    same, different = mean([1, 1]), mean([1, 0])
    torch.testing.assert_close(same[0], same[1])
    assert not torch.allclose(different[0], different[1])
    torch.testing.assert_close(different[0], same[0])
