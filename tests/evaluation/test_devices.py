"""Figures that are reported do not depend on the device, nor on what training has set for it."""

from __future__ import annotations

import pytest

from tests.support.devices import DEVICES, runtime_on
from tests.support.evaluated import all_metrics, batches, tiny_model
from vae_dist.evaluation.run import EvaluationResult, evaluate
from vae_dist.training.compile import use_tensor_float_32


def result_on(device: str, **keys: str) -> EvaluationResult:
    with runtime_on(device) as runtime:
        use_tensor_float_32(runtime.device, "bf16")
        model = tiny_model(**keys).to(runtime.device)
        metrics = all_metrics(model, runtime.device)
        result = evaluate(model, batches(4), runtime=runtime, seed=3, metrics=metrics)
        use_tensor_float_32(runtime.device, "no")
    assert result is not None
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("latent", "kind"), [("vector", "bernoulli"), ("spatial", "gaussian")])
def test_an_evaluation_is_that_of_the_cpu(device: str, latent: str, kind: str) -> None:
    expected = result_on("cpu", latent=latent, kind=kind)
    found = result_on(device, latent=latent, kind=kind)
    assert found.figures.keys() == expected.figures.keys()
    for name, value in expected.figures.items():
        # pictures are rounded to levels, so that a rounding may move one of them
        is_of_pictures = name in ("rfid", "fid", "psnr_db")
        assert found.figures[name] == pytest.approx(value, rel=1e-2 if is_of_pictures else 1e-4)
    kl = expected.latent.kl_nats_per_unit
    assert found.latent.kl_nats_per_unit == pytest.approx(kl, rel=1e-4)
    assert found.statistics.std == pytest.approx(expected.statistics.std, rel=1e-4)
