from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.support.tiny_run import tiny_config
from vae_dist.config.schema import RuntimeConfig
from vae_dist.evaluation.latents import LatentReport, LatentSums
from vae_dist.models.build import build_vae
from vae_dist.runtime import Runtime


def report(latent: str, mean: torch.Tensor, log_variance: torch.Tensor) -> LatentReport:
    runtime = Runtime.start(RuntimeConfig(device="cpu", threads=1), precision="no")
    sums = LatentSums(build_vae(tiny_config(latent=latent), (8, 8)), runtime.device)
    for part in range(0, len(mean), 3):
        sums.add(mean[part : part + 3], log_variance[part : part + 3])
    return sums.report(runtime)


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
