"""Metrics against closed forms: reconstructions, latents, another prior, the Frechet distance."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.support.evaluated import (
    CPU,
    IMAGES,
    NUM_IMAGES,
    SIZE,
    result_of,
    start,
    tiny_model,
)
from vae_dist.evaluation.frechet import FrechetMetric, frechet_distance
from vae_dist.evaluation.metrics import (
    EvaluatedBatch,
    Inputs,
    LatentSums,
    comparisons,
    in_colour,
    mutual_information_nats,
    psnr_db,
)
from vae_dist.inference.mixture import GaussianMixture
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.likelihoods.base import Levels
from vae_dist.tracking.images import to_uint8


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bits", [5, 8])
def test_a_perfect_reconstruction_is_perfect_at_any_bits(bits):
    """Of 5 bits, the original is the image that the model was given."""
    stored, levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), Levels(bits)
    images = levels.centers(stored)
    likelihood = SimpleNamespace(levels=levels, mean=lambda params: params)
    model = SimpleNamespace(likelihood=likelihood, num_levels=0, decode=lambda *_: images)
    output = SimpleNamespace(mean=0)
    both = EvaluatedBatch(model, Inputs(stored, images, [0]), images, output).pictures
    assert psnr_db(*both).tolist() == [100]
    distance = (both[0] - stored.float() / 255).abs().max().item()
    assert distance == 0 if bits == 8 else 0.02 < distance < 8 / 255


def test_ssim_of_constant_images_is_the_luminance_term():
    a, b, c1 = 0.2, 0.6, 0.01**2  # for a data range of 1
    luminance = (2 * a * b + c1) / (a * a + b * b + c1)
    compare = comparisons(["ssim", "ms_ssim"])
    pair = torch.full((1, 1, 176, 180), a), torch.full((1, 1, 176, 180), b)
    # the luminance counts at the coarsest scale alone, whose exponent is 0.1333
    for name, expected in (("ssim", luminance), ("ms_ssim", luminance**0.1333)):
        assert float(compare[name].function(*pair)) == pytest.approx(expected, abs=1e-6)


# latents


def latent_report(*groups):
    """Of groups of (mean, log variance, z, numbers)."""
    sums = LatentSums(3, CPU)
    for mean, log_variance, z, numbers in groups:
        for rows in torch.arange(len(mean)).split(3):
            output = SimpleNamespace(mean=mean[rows], log_variance=log_variance[rows], z=z[rows])
            sums.update(output, [numbers[row] for row in rows])
    return sums.compute(start())


@pytest.mark.parametrize("shape", [(3,), (3, 4, 4)])
def test_latents_against_torch_distributions(shape):
    mean, log_variance = randn(10, *shape).float(), randn(10, *shape, seed=1).float()
    mean[:, 1] *= 0.05  # of standard deviation 0.05: not active
    found = latent_report((mean, log_variance, mean, range(10)))
    kl = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    expected = kl.reshape(10, 3, -1).sum(2).mean(0).tolist()
    assert found.kl_nats_per_unit == pytest.approx(expected, rel=1e-5)
    assert (found.active_units, found.active_fraction) == (2, pytest.approx(2 / 3))
    assert found.posterior_variance == pytest.approx(log_variance.exp().mean().item())
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    collapsed = latent_report((torch.full((5, 3), 2.0), torch.zeros(5, 3), noise, range(5)))
    assert (collapsed.active_units, collapsed.posterior_variance) == (0, 1.0)
    assert collapsed.mutual_information_nats == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("sigma", [2.0, 0.5])
def test_mutual_information_of_a_gaussian_channel(sigma):
    """x ~ N(0, 1) and q(z|x) = N(x, sigma^2) in each of 2 dimensions: I = log(1 + 1/sigma^2)."""
    found = []
    for seed in range(8):
        mean = randn(512, 2, seed=seed)
        z = mean + sigma * randn(512, 2, seed=seed + 8)
        log_variance = torch.full_like(mean, 2 * math.log(sigma))
        found.append(mutual_information_nats(mean, log_variance, z))
    # of 4,096 draws the standard error is below 0.02
    assert sum(found) / 8 == pytest.approx(math.log1p(1 / sigma**2), abs=0.05)


def test_mutual_information_is_at_most_the_log_of_the_images_of_one_shape():
    mean = torch.arange(64.0).unsqueeze(1)
    found = mutual_information_nats(mean, torch.full_like(mean, -20.0), mean)
    assert found == pytest.approx(math.log(64))
    few, many = torch.randn(2, 3, 2, 2), torch.randn(5, 3, 4, 2)
    found = latent_report((few, 0 * few - 20, few, [5, 6]), (many, 0 * many - 20, many, range(5)))
    assert found.mutual_information_nats == pytest.approx(math.log(5))


# the Frechet distance


def test_distance_of_gaussians_with_commuting_covariances():
    """Then d^2 = |m_1 - m_2|^2 + sum (sqrt(a) - sqrt(b))^2 over the eigenvalues."""
    basis, shift = torch.linalg.qr(randn(5, 5))[0], randn(5, seed=3)
    a, b = randn(5, seed=1).square(), randn(5, seed=2).square()
    exact = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    cov_a, cov_b = ((basis * values) @ basis.T for values in (a, b))
    found = frechet_distance(shift, cov_a, torch.zeros(5, dtype=torch.float64), cov_b)
    assert found == pytest.approx(float(exact), rel=1e-9)


def pixels(images):
    """A feature network for tests: (b, 3, H, W) in [0, 1] -> (b, 4)."""
    assert images.shape[1] == 3
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    return images[:, 0, :2, :2].flatten(1)


def test_fid_is_of_the_samples_that_sample_draws():
    one = torch.ones(1, 3, dtype=torch.float64)
    mixture = GaussianMixture(torch.zeros(1, dtype=torch.float64), 2 * one, one)
    model, priors = tiny_model(), {"fid": None, "fid_gmm": mixture}
    metric = FrechetMetric(pixels, 4, model, CPU, of_reconstructions=True, priors=priors, seed=3)
    result = result_of(model, metric)
    assert "of 13 images: biased" in result.notes["frechet"] and "rfid" in result.figures
    for name, prior in priors.items():
        samples = to_uint8(BatchedVAE(model).sample(NUM_IMAGES, SIZE, seed=3, prior=prior))
        sides = []
        for shown in (IMAGES, samples):
            features = pixels(in_colour(shown.float() / 255)).double()
            sides += [features.mean(0), torch.cov(features.T)]
        exact = frechet_distance(*sides)
        assert result.figures[name] == pytest.approx(exact, rel=1e-5), name
