"""PSNR, SSIM and MS-SSIM: against closed forms, each image once, small ones left out by name."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.evaluation.test_run import batches, tiny_model
from tests.support.distributed import run_ranks
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime
from vae_dist.evaluation.metrics import (
    EvaluatedBatch,
    Inputs,
    ReconstructionMetric,
    comparisons,
    psnr_db,
)
from vae_dist.evaluation.run import EvaluationResult, evaluate
from vae_dist.models.likelihoods.base import Levels
from vae_dist.randomness import torch_generator

CPU = torch.device("cpu")


def seen(images: torch.Tensor, reconstructions: torch.Tensor) -> EvaluatedBatch:
    inputs = Inputs(images, images, list(range(len(images))))
    shown = EvaluatedBatch(cast(Any, None), inputs, *cast(Any, [None] * 2))
    shown.__dict__["pictures"] = (images, reconstructions)
    return shown


def start() -> Runtime:
    return Runtime.start(RuntimeConfig(device="cpu", threads=1), precision="no")


def test_psnr_of_a_known_error() -> None:
    images = torch.rand(2, 3, 8, 9) / 2
    values = psnr_db(images, images + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1))
    assert values.tolist() == pytest.approx([20, 40], abs=1e-4)
    assert psnr_db(images, images).tolist() == [100, 100]  # and not infinity


@pytest.mark.parametrize("bits", [5, 8])
def test_a_perfect_reconstruction_is_perfect_at_any_bits(bits: int) -> None:
    """Of 5 bits, the original is the image that the model was given."""
    stored = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    levels = Levels(bits)
    images = levels.centers(stored)
    likelihood = SimpleNamespace(levels=levels, mean=lambda params: params)
    model = SimpleNamespace(likelihood=likelihood, decode=lambda *_: images)
    both = EvaluatedBatch(
        cast(Any, model), Inputs(stored, images, [0]), images, cast(Any, SimpleNamespace(mean=0))
    ).pictures
    assert psnr_db(*both).tolist() == [100]
    distance = (both[0] - stored.float() / 255).abs().max().item()
    assert distance == 0 if bits == 8 else 0.02 < distance < 8 / 255


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b = 0.2, 0.6
    c1 = 0.01**2  # for a data range of 1
    luminance = (2 * a * b + c1) / (a * a + b * b + c1)
    compare = comparisons(["ssim", "ms_ssim"])
    pair = torch.full((1, 1, 176, 180), a), torch.full((1, 1, 176, 180), b)
    assert float(compare["ssim"][0](*pair)) == pytest.approx(luminance, abs=1e-6)
    # the luminance counts at the coarsest scale alone, whose exponent is 0.1333
    assert float(compare["ms_ssim"][0](*pair)) == pytest.approx(luminance**0.1333, abs=1e-6)


def test_small_images_are_left_out_and_counted() -> None:
    meter = ReconstructionMetric(comparisons(["psnr", "ms_ssim"]), CPU)
    large = torch.rand(2, 1, 176, 176)
    meter.update(seen(large, large))
    meter.update(seen(torch.zeros(3, 1, 175, 300), torch.full((3, 1, 175, 300), 0.1)))
    report = meter.compute(start())
    assert report.figures["ms_ssim"] == pytest.approx(1.0)
    assert report.figures["psnr_db"] == pytest.approx((2 * 100 + 3 * 20) / 5, abs=1e-4)
    assert set(report.notes) == {"ms_ssim"}
    assert "3 of 5 images have a side of less than 176 pixels" in report.notes["ms_ssim"]


def test_no_image_is_large_enough() -> None:
    meter = ReconstructionMetric(comparisons(["ssim"]), CPU)
    meter.update(seen(torch.zeros(3, 1, 10, 10), torch.zeros(3, 1, 10, 10)))
    report = meter.compute(start())
    assert report.figures == {}
    assert "3 of 3 images" in report.notes["ssim"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    assert "psnr_db" in comparisons(["psnr"])
    with pytest.raises(ConfigError, match=r"pip install 'vae_dist\[metrics\]'"):
        comparisons(["ssim"])


def measured(batch_size: int) -> EvaluationResult:
    runtime, model = start(), tiny_model()
    result = evaluate(
        model,
        batches(batch_size, rank=runtime.rank, world=runtime.world),
        runtime=runtime,
        seed=3,
        metrics=[ReconstructionMetric(comparisons(["psnr"]), CPU)],
    )
    assert result is not None
    return result


def test_reconstructions_are_those_of_the_posterior_mean_in_8_bits() -> None:
    model = tiny_model()
    total = 0.0
    for batch in batches(1):
        image = batch.images.double() / 255
        sample = int(batch.samples[0])
        if sample < 0:
            continue
        uniform = torch.rand(1, 6, 5, generator=torch_generator(3, "eval-levels", sample))
        with torch.no_grad():
            mean, _ = model.encode(model.likelihood.prepare(batch.images, uniform[None]))
            ink = torch.sigmoid(model.decode(mean, (6, 5))).double()
        error = (image - (255 * ink).round() / 255).square().mean()
        total -= 10 * math.log10(float(error))
    assert measured(13).measured["psnr_db"] == pytest.approx(total / 13, abs=1e-3)


def test_two_ranks_and_other_batches_agree(tmp_path: Path) -> None:
    alone = measured(13).measured
    assert measured(4).measured == pytest.approx(alone, rel=1e-5)
    first, second = run_ranks(2, measured_on_a_rank, tmp_path)
    assert first == second == pytest.approx(alone, rel=1e-5)


def measured_on_a_rank(_: Path) -> dict[str, float]:
    return measured(2).measured
