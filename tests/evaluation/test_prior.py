"""The bound under a mixture: N(0, I) in other words, and against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from tests.evaluation.test_run import IMAGES, NUM_IMAGES, batches, tiny_model
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime
from vae_dist.evaluation.importance import ImportanceMetric
from vae_dist.evaluation.metrics import PriorMetric
from vae_dist.evaluation.run import evaluate
from vae_dist.inference.mixture import GaussianMixture
from vae_dist.randomness import torch_generator

CPU = torch.device("cpu")


def gaussian(mean: float, sigma: float) -> GaussianMixture:
    """Two equal components, which are one."""
    halves = torch.full((2,), 0.5, dtype=torch.float64).log()
    shape = torch.ones(2, 3, dtype=torch.float64)
    return GaussianMixture(halves, mean * shape, sigma * shape)


def figures(mixture: GaussianMixture) -> dict[str, float]:
    runtime = Runtime.start(RuntimeConfig(device="cpu", threads=1), precision="no")
    model = tiny_model()
    importance = ImportanceMetric(model, CPU, num_samples=5, seed=3, priors={"gmm": mixture})
    meters = [PriorMetric("gmm", mixture, CPU), importance]
    result = evaluate(model, batches(4), runtime=runtime, seed=3, metrics=meters)
    assert result is not None
    return result.figures()


def test_the_standard_normal_as_a_mixture_changes_no_estimate() -> None:
    found = figures(gaussian(0.0, 1.0))
    assert found["is_nll_gmm_nats"] == pytest.approx(found["is_nll_nats"], rel=1e-6)
    assert found["is_effective_samples_gmm"] == pytest.approx(found["is_effective_samples"])


def test_the_bound_is_that_of_the_draw() -> None:
    found = figures(gaussian(0.7, 1.3))
    model, rate = tiny_model(), 0.0
    for sample, image in enumerate(IMAGES):
        uniform = torch.rand(1, 6, 5, generator=torch_generator(3, "eval-levels", sample))
        noise = torch.randn(3, generator=torch_generator(3, "eval-posterior", sample))
        with torch.no_grad():
            moments = model.encode(model.likelihood.prepare(image[None], uniform[None]))
        q = Normal(moments[0][0].double(), (moments[1][0].double() / 2).exp())
        z = q.mean + q.stddev * noise
        rate += float((q.log_prob(z) - Normal(0.7, 1.3).log_prob(z)).sum()) / NUM_IMAGES
    assert found["rate_gmm_nats"] == pytest.approx(rate, rel=1e-5)
    assert found["neg_elbo_gmm_nats"] == pytest.approx(rate + found["distortion_nats"], rel=1e-6)
    assert found["neg_elbo_gmm_se_nats"] > 0
