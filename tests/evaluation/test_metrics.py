"""Metrics against closed forms: reconstructions, latents, the bound under another prior."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.support.evaluated import CPU, IMAGES, NUM_IMAGES, result_of, start, tiny_model
from vae_dist.config.errors import ConfigError
from vae_dist.evaluation.importance import ImportanceMetric
from vae_dist.evaluation.metrics import (
    EvaluatedBatch,
    Inputs,
    LatentReport,
    LatentSums,
    PriorMetric,
    ReconstructionMetric,
    comparisons,
    mutual_information_nats,
    psnr_db,
)
from vae_dist.inference.mixture import GaussianMixture
from vae_dist.models.likelihoods.base import Levels
from vae_dist.randomness import torch_generator

NOTHING: Any = None


def seen(images: torch.Tensor, reconstructions: torch.Tensor) -> EvaluatedBatch:
    inputs = Inputs(images, images, list(range(len(images))))
    shown = EvaluatedBatch(NOTHING, inputs, NOTHING, NOTHING)
    shown.__dict__["pictures"] = (images, reconstructions)
    return shown


def test_psnr_of_a_known_error() -> None:
    images = torch.rand(2, 3, 8, 9) / 2
    values = psnr_db(images, images + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1))
    assert values.tolist() == pytest.approx([20, 40], abs=1e-4)
    assert psnr_db(images, images).tolist() == [100, 100]  # and not infinity


@pytest.mark.parametrize("bits", [5, 8])
def test_a_perfect_reconstruction_is_perfect_at_any_bits(bits: int) -> None:
    """Of 5 bits, the original is the image that the model was given."""
    stored, levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), Levels(bits)
    images = levels.centers(stored)
    likelihood = SimpleNamespace(levels=levels, mean=lambda params: params)
    model: Any = SimpleNamespace(likelihood=likelihood, decode=lambda *_: images)
    output: Any = SimpleNamespace(mean=0)
    both = EvaluatedBatch(model, Inputs(stored, images, [0]), images, output).pictures
    assert psnr_db(*both).tolist() == [100]
    distance = (both[0] - stored.float() / 255).abs().max().item()
    assert distance == 0 if bits == 8 else 0.02 < distance < 8 / 255


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b = 0.2, 0.6
    c1 = 0.01**2  # for a data range of 1
    luminance = (2 * a * b + c1) / (a * a + b * b + c1)
    compare = comparisons(["ssim", "ms_ssim"])
    pair = torch.full((1, 1, 176, 180), a), torch.full((1, 1, 176, 180), b)
    assert float(compare["ssim"].function(*pair)) == pytest.approx(luminance, abs=1e-6)
    # the luminance counts at the coarsest scale alone, whose exponent is 0.1333
    found = float(compare["ms_ssim"].function(*pair))
    assert found == pytest.approx(luminance**0.1333, abs=1e-6)


def test_small_images_are_left_out_and_counted() -> None:
    metric = ReconstructionMetric(comparisons(["psnr", "ms_ssim"]), CPU)
    large = torch.rand(2, 1, 176, 176)
    metric.update(seen(large, large))
    metric.update(seen(torch.zeros(3, 1, 175, 300), torch.full((3, 1, 175, 300), 0.1)))
    report = metric.compute(start())
    assert report.figures["ms_ssim"] == pytest.approx(1.0)
    assert report.figures["psnr_db"] == pytest.approx((2 * 100 + 3 * 20) / 5, abs=1e-4)
    assert set(report.notes) == {"ms_ssim"}
    assert "3 of 5 images have a side of less than 176 pixels" in report.notes["ms_ssim"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    assert "psnr_db" in comparisons(["psnr"])
    with pytest.raises(ConfigError, match=r"pip install 'vae_dist\[metrics\]'"):
        comparisons(["ssim"])


def posterior(sample: int) -> Normal:
    """q(z|x) of the image that an evaluation with seed 3 gives to `tiny_model`."""
    uniform = torch.rand(1, 1, 6, 5, generator=torch_generator(3, "eval-levels", sample))
    model = tiny_model()
    with torch.no_grad():
        mean, log_variance = model.encode(model.likelihood.prepare(IMAGES[[sample]], uniform))
    return Normal(mean.double(), (log_variance.double() / 2).exp())


def test_reconstructions_are_those_of_the_posterior_mean_in_8_bits() -> None:
    model, total = tiny_model(), 0.0
    for sample, image in enumerate(IMAGES.double() / 255):
        with torch.no_grad():
            ink = torch.sigmoid(model.decode(posterior(sample).mean.float(), (6, 5))).double()
        total -= 10 * math.log10(float((image - (255 * ink).round() / 255).square().mean()))
    found = result_of(model, ReconstructionMetric(comparisons(["psnr"]), CPU)).figures
    assert found["psnr_db"] == pytest.approx(total / NUM_IMAGES, abs=1e-3)


# latents


def latent_report(mean: torch.Tensor, log_variance: torch.Tensor) -> LatentReport:
    sums, noise = LatentSums(3, CPU), torch.Generator().manual_seed(1)
    z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=noise)
    for part in range(0, len(mean), 3):
        rows = range(part, min(part + 3, len(mean)))
        sums.update(mean[rows], log_variance[rows], z=z[rows], samples=rows)
    return sums.compute(start())


@pytest.mark.parametrize("shape", [(3,), (3, 4, 4)])
def test_against_torch_distributions(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(10, *shape, generator=generator)
    mean[:, 1] *= 0.05  # of standard deviation 0.05: not active
    log_variance = torch.randn(10, *shape, generator=generator)
    found = latent_report(mean, log_variance)
    kl = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    expected = kl.reshape(10, 3, -1).sum(2).mean(0)
    torch.testing.assert_close(torch.tensor(found.kl_nats_per_unit), expected)
    assert (found.active_units, found.active_fraction) == (2, pytest.approx(2 / 3))
    assert found.posterior_variance == pytest.approx(log_variance.exp().mean().item())


def test_a_collapsed_posterior_has_no_active_unit() -> None:
    found = latent_report(torch.full((5, 3), 2.0), torch.zeros(5, 3))
    assert (found.active_units, found.posterior_variance) == (0, 1.0)
    assert found.kl_nats_per_unit == pytest.approx([2.0] * 3)
    assert found.mutual_information_nats == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("sigma", [2.0, 0.5])
def test_mutual_information_of_a_gaussian_channel(sigma: float) -> None:
    """x ~ N(0, 1) and q(z|x) = N(x, sigma^2) in each of 2 dimensions: I = log(1 + 1/sigma^2)."""
    found = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        mean = torch.randn(512, 2, generator=generator)
        z = mean + sigma * torch.randn(512, 2, generator=generator)
        log_variance = torch.full_like(mean, 2 * math.log(sigma))
        found.append(mutual_information_nats(mean, log_variance, z))
    # of 4,096 draws the standard error is below 0.02
    assert sum(found) / 8 == pytest.approx(math.log1p(1 / sigma**2), abs=0.05)


def test_mutual_information_is_at_most_the_log_of_the_images_of_one_shape() -> None:
    mean = torch.arange(64.0).unsqueeze(1)
    found = mutual_information_nats(mean, torch.full_like(mean, -20.0), mean)
    assert found == pytest.approx(math.log(64))
    few, many = torch.randn(2, 3, 2, 2), torch.randn(5, 3, 4, 2)
    sums = LatentSums(3, CPU)
    sums.update(few, 0 * few - 20, z=few, samples=[5, 6])
    sums.update(many, 0 * many - 20, z=many, samples=range(5))
    assert sums.compute(start()).mutual_information_nats == pytest.approx(math.log(5))


# priors


def figures_under(mean: float, sigma: float) -> dict[str, float]:
    """With two equal components, which are one Gaussian."""
    halves = torch.full((2,), 0.5, dtype=torch.float64).log()
    shape = torch.ones(2, 3, dtype=torch.float64)
    mixture, model = GaussianMixture(halves, mean * shape, sigma * shape), tiny_model()
    importance = ImportanceMetric(model, CPU, num_samples=5, seed=3, priors={"gmm": mixture})
    return result_of(model, PriorMetric("gmm", mixture, CPU), importance, batch_size=4).figures


def test_the_standard_normal_as_a_mixture_changes_no_estimate() -> None:
    found = figures_under(0.0, 1.0)
    assert found["is_nll_gmm_nats"] == pytest.approx(found["is_nll_nats"], rel=1e-6)
    assert found["is_effective_samples_gmm"] == pytest.approx(found["is_effective_samples"])


def test_the_bound_is_that_of_the_draw() -> None:
    found, rate = figures_under(0.7, 1.3), 0.0
    for sample in range(NUM_IMAGES):
        q = posterior(sample)
        z = q.mean + q.stddev * torch.randn(
            3, generator=torch_generator(3, "eval-posterior", sample)
        )
        rate += float((q.log_prob(z) - Normal(0.7, 1.3).log_prob(z)).sum()) / NUM_IMAGES
    assert found["rate_gmm_nats"] == pytest.approx(rate, rel=1e-5)
    assert found["neg_elbo_gmm_nats"] == pytest.approx(rate + found["distortion_nats"], rel=1e-6)
    assert found["neg_elbo_gmm_se_nats"] > 0
