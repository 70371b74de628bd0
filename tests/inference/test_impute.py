"""Imputation against the linear-Gaussian model, where E[x_missing | x_observed] is known."""

import pytest
import torch

from tests.support.linear_gaussian import IMAGE_SIZE, SIGMA, linear_gaussian
from vae_dist.config.commands import ImputeCommand, RunCommand
from vae_dist.inference.impute import impute
from vae_dist.inference.load import load_model

NUM_IMAGES = 5
MASK = torch.ones(NUM_IMAGES, 1, *IMAGE_SIZE, dtype=torch.uint8)
MASK[:, :, :, IMAGE_SIZE[1] // 2 :] = 0
METHODS = pytest.mark.parametrize("method", ["single", "importance", "gibbs"])


def exact(toy):
    """Mean and standard deviation of g(z) = W z + b given the observed pixels, float64 (n, D)."""
    observed = MASK[0].flatten().bool()
    weight, x = toy.weight[observed], toy.prepared(NUM_IMAGES).double().flatten(1)[:, observed]
    precision = torch.eye(weight.shape[1], dtype=torch.float64) + weight.T @ weight / SIGMA**2
    covariance = torch.linalg.inv(precision)
    mean_z = (x - toy.bias[observed]) @ weight @ covariance / SIGMA**2  # (n, L)
    variance = torch.einsum("dl,lm,dm->d", toy.weight, covariance, toy.weight)
    return mean_z @ toy.weight.T + toy.bias, variance.sqrt().expand(len(x), -1)


def run(toy, method, *, images=None, part=slice(None), batch_size=10_000, **options):
    how = ImputeCommand(method=method, batch_size=batch_size, **options)
    shown = (toy.prepared(NUM_IMAGES) if images is None else images)[part]
    return impute(toy.model, shown, MASK[part], how, numbers=range(NUM_IMAGES)[part])


def test_the_importance_weighted_mean_and_draws_tend_to_the_conditional_distribution():
    # the encoder misses, but is wide enough for weights that are bounded
    toy = linear_gaussian(encoder_error=1.0)
    mean, deviation = exact(toy)
    errors = []
    for num_samples in (40, 40_000):
        found = run(toy, "importance", samples=num_samples)
        assert (found.effective_samples > 1).all()
        errors.append((found.mean.flatten(1) - mean).abs() / deviation)
    # within five standard errors of an estimate from that many effective samples
    assert (errors[1] < 5 / found.effective_samples.sqrt().unsqueeze(1)).all()
    assert errors[1].mean() < 0.3 * errors[0].mean()
    ratio = found.deviation.flatten(1) / deviation
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=0.1)
    draws = run(toy, "importance", part=slice(1), samples=6000, draws=400).draws[0].flatten(1)
    assert ((draws.double().mean(0) - mean[0]).abs() < 0.3 * deviation[0]).all()
    torch.testing.assert_close(draws.double().std(0), deviation[0], rtol=0.3, atol=0)


def test_pseudo_gibbs_finds_the_conditional_mean_where_the_encoder_is_exact():
    """For complete images it is, so the chains sample p(z, x_missing | x_obs) exactly."""
    toy = linear_gaussian()
    mean, deviation = exact(toy)
    found = run(toy, "gibbs", samples=150, draws=60)
    assert ((found.mean.flatten(1) - mean).abs() < 0.25 * deviation).all()
    torch.testing.assert_close(found.deviation.flatten(1).double(), deviation, rtol=0.2, atol=0)


@METHODS
def test_neither_batch_nor_chunk_nor_missing_values_matter(method):
    toy = linear_gaussian()
    whole = run(toy, method, samples=70, draws=3)
    broken = torch.where(MASK > 0, toy.prepared(NUM_IMAGES), float("nan"))
    for images, part, chunk in (
        (None, slice(5), 7),
        (None, slice(2, 4), 9),
        (broken, slice(5), 99),
    ):
        found = run(toy, method, images=images, part=part, batch_size=chunk, samples=70, draws=3)
        for one, two in zip(found, whole, strict=True):
            torch.testing.assert_close(one, two[part], rtol=1e-4, atol=1e-5)


@METHODS
def test_labels_and_masks_reach_the_model(conditional_run, method):
    model, images = load_model(RunCommand(run=str(conditional_run))).model, torch.ones(2, 1, 12, 10)
    mask = torch.zeros(2, 1, 12, 10, dtype=torch.uint8)
    mask[:, :, :4] = 1
    how = ImputeCommand(method=method, samples=4, draws=2)
    same, different = (
        impute(model, images, mask, how, labels=torch.tensor(labels), numbers=[0, 0]).mean
        for labels in ([1, 1], [1, 0])
    )
    torch.testing.assert_close(same[0], same[1])
    assert not torch.allclose(different[0], different[1])
    torch.testing.assert_close(different[0], same[0])
