from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.support.tiny_run import tiny_config
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime
from vae_dist.evaluation.metrics import LatentReport, LatentSums, mutual_information_nats
from vae_dist.models.build import build_vae


def report(latent: str, mean: torch.Tensor, log_variance: torch.Tensor) -> LatentReport:
    runtime = Runtime.start(RuntimeConfig(device="cpu", threads=1), precision="no")
    sums = LatentSums(build_vae(tiny_config(latent=latent), (8, 8)), runtime.device)
    z = mean + (0.5 * log_variance).exp() * torch.randn(
        mean.shape, generator=torch.Generator().manual_seed(1)
    )
    for part in range(0, len(mean), 3):
        rows = range(part, min(part + 3, len(mean)))
        sums.update(mean[rows], log_variance[rows], z=z[rows], samples=rows)
    return sums.compute(runtime)


@pytest.mark.parametrize(("latent", "shape"), [("vector", (3,)), ("spatial", (3, 4, 4))])
def test_against_torch_distributions(latent: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(10, *shape, generator=generator)
    mean[:, 1] *= 0.05  # of standard deviation 0.05: not active
    log_variance = torch.randn(10, *shape, generator=generator)
    found = report(latent, mean, log_variance)
    kl = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    expected = kl.reshape(10, 3, -1).sum(2).mean(0)
    torch.testing.assert_close(torch.tensor(found.kl_nats_per_unit), expected)
    assert (found.active_units, found.active_fraction) == (2, pytest.approx(2 / 3))
    assert found.posterior_variance == pytest.approx(log_variance.exp().mean().item())


def test_a_collapsed_posterior_has_no_active_unit() -> None:
    found = report("vector", torch.full((5, 3), 2.0), torch.zeros(5, 3))
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


def test_mutual_information_is_at_most_the_log_of_the_images() -> None:
    mean = torch.arange(64.0).unsqueeze(1)
    found = mutual_information_nats(mean, torch.full_like(mean, -20.0), mean)
    assert found == pytest.approx(math.log(64))


def test_images_of_other_latent_shapes_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    few, many = (
        torch.randn(2, 3, 2, 2, generator=generator),
        torch.randn(5, 3, 4, 2, generator=generator),
    )
    runtime = Runtime.start(RuntimeConfig(device="cpu", threads=1), precision="no")
    sums = LatentSums(build_vae(tiny_config(latent="spatial"), (8, 8)), runtime.device)
    sums.update(few, 0 * few - 20, z=few, samples=[5, 6])
    sums.update(many, 0 * many - 20, z=many, samples=range(5))
    assert sums.compute(runtime).mutual_information_nats == pytest.approx(math.log(5))
