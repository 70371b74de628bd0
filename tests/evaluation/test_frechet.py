"""The Frechet distance against closed forms; moments over batches and ranks; whose it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.evaluated import CPU, IMAGES, NUM_IMAGES, result_of, start, tiny_model
from vae_dist.config.errors import ConfigError
from vae_dist.evaluation.frechet import FrechetMetric, Moments, frechet_distance
from vae_dist.evaluation.metrics import EvaluatedBatch, Inputs, in_colour
from vae_dist.inference.mixture import GaussianMixture
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.tracking.images import to_uint8


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_of_gaussians_with_commuting_covariances() -> None:
    """Then d^2 = |m_1 - m_2|^2 + sum (sqrt(a) - sqrt(b))^2 over the eigenvalues."""
    basis = torch.linalg.qr(random(5, 5))[0]
    a, b = random(5, seed=1).square(), random(5, seed=2).square()
    shift = random(5, seed=3)
    exact = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    cov_a, cov_b = ((basis * values) @ basis.T for values in (a, b))
    found = frechet_distance(shift, cov_a, torch.zeros(5, dtype=torch.float64), cov_b)
    assert found == pytest.approx(float(exact), rel=1e-9)


def test_it_is_zero_for_equal_moments_and_symmetric_also_where_singular() -> None:
    moments = Moments(10, CPU)
    moments.add(random(4, 10))  # rank 3 of 10
    _, mean, cov = moments.pooled(start())
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-6)
    other = random(10, 10, seed=5)
    there, back = (mean, cov), (-mean, other @ other.T)
    assert frechet_distance(*there, *back) == pytest.approx(
        frechet_distance(*back, *there), rel=1e-6
    )


def test_moments_are_those_of_all_features_together() -> None:
    features = 100 + random(50, 6).float()
    moments = Moments(6, CPU)
    for part in features.split(7):
        moments.add(part)
    count, mean, cov = moments.pooled(start())
    assert count == 50
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(cov, torch.cov(features.double().T))


def pixels(images: Tensor) -> Tensor:
    """A feature network for tests: (b, 3, H, W) in [0, 1] -> (b, 4)."""
    assert images.shape[1] == 3
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    return images[:, 0, :2, :2].flatten(1)


def test_the_samples_are_those_that_sample_draws() -> None:
    one = torch.ones(1, 3, dtype=torch.float64)
    mixture = GaussianMixture(torch.zeros(1, dtype=torch.float64), 2 * one, one)
    model, priors = tiny_model(), {"fid": None, "fid_gmm": mixture}
    metric = FrechetMetric(pixels, 4, model, CPU, of_reconstructions=True, priors=priors, seed=3)
    result = result_of(model, metric)
    assert "of 13 images: biased" in result.notes["frechet"] and "rfid" in result.figures
    for name, prior in priors.items():
        samples = to_uint8(BatchedVAE(model).sample(NUM_IMAGES, (6, 5), seed=3, prior=prior))
        sides = []
        for shown in (IMAGES, samples):
            features = pixels(in_colour(shown.float() / 255)).double()
            sides += [features.mean(0), torch.cov(features.T)]
        exact = frechet_distance(*sides)
        assert result.figures[name] == pytest.approx(exact, rel=1e-5), name


def test_images_of_several_sizes_have_no_fid_of_samples() -> None:
    model = tiny_model(latent="spatial")
    metric = FrechetMetric(
        pixels, 4, model, CPU, of_reconstructions=True, priors={"fid": None}, seed=0
    )
    for side in (4, 6):
        images = torch.rand(3, 1, side, side)
        seen = EvaluatedBatch(model, Inputs(images, images, [0, 1, 2]), images, None)  # type: ignore[arg-type]
        seen.__dict__["pictures"] = (images, images)
        metric.update(seen)
    report = metric.compute(start())
    assert report.figures == {"rfid": pytest.approx(0, abs=1e-9)}
    assert report.notes["fid"] == "fid is left out: the images have 2 sizes"


def test_channels_that_the_networks_do_not_know_are_refused() -> None:
    assert in_colour(torch.zeros(2, 1, 3, 3)).shape == (2, 3, 3, 3)
    with pytest.raises(ConfigError, match="not for 5 channels"):
        in_colour(torch.zeros(2, 5, 3, 3))
