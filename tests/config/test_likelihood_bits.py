"""Which likelihoods float images (data.bits=32) can have."""

from __future__ import annotations

import pytest

from vae_dist.config.checks import violations
from vae_dist.config.schema import DataConfig, LikelihoodConfig, TrainConfig


def likelihood_problems(**data: object) -> list[str]:
    kind = data.pop("kind")
    config = TrainConfig(
        config="test",
        data=DataConfig(train="a", validation="b", bits=32, **data),
        likelihood=LikelihoodConfig(kind=kind),
    )
    found = violations(config)
    return [v.text for v in found if v.keys[0] in ("likelihood.kind", "data.dequantize")]


@pytest.mark.parametrize("kind", ["discretized_gaussian", "discretized_logistic_mixture"])
def test_float_images_have_no_levels(kind: str) -> None:
    (problem,) = likelihood_problems(kind=kind)
    assert f"likelihood.kind={kind} gives probabilities of levels" in problem
    assert "use likelihood.kind=gaussian" in problem


def test_a_density_suits_float_images() -> None:
    assert likelihood_problems(kind="gaussian") == []
    (problem,) = likelihood_problems(kind="gaussian", dequantize=False)
    assert "data.dequantize=false has no effect with data.bits=32" in problem
