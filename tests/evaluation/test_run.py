from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from tests.support.distributed import run_ranks
from tests.support.tiny_run import tiny_config
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import RuntimeConfig
from vae_dist.data.evaluation import EvaluationBatch
from vae_dist.distributed import Runtime
from vae_dist.evaluation.frechet import FrechetMetric
from vae_dist.evaluation.importance import ImportanceMetric
from vae_dist.evaluation.metrics import Metric, ReconstructionMetric, psnr_db
from vae_dist.evaluation.run import (
    COUNTS,
    SAME,
    EvaluationResult,
    as_json,
    conditions_of,
    evaluate,
    merged_with_earlier,
)
from vae_dist.models.build import build_vae
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator

NUM_IMAGES = 13
IMAGES = torch.randint(
    0, 256, (NUM_IMAGES, 1, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)


def tiny_model(**keys: str) -> VAE:
    model = build_vae(tiny_config(**keys), (6, 5))
    with torch.no_grad():  # leave the symmetric start, so that every term counts
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch_generator(number, ""))
            )
    return model


def batches(batch_size: int, *, rank: int = 0, world: int = 1) -> Iterator[EvaluationBatch]:
    """Rank's share, padded with images that would ruin any mean that they entered."""
    for low in range(0, NUM_IMAGES, batch_size * world):
        samples = torch.arange(low + rank * batch_size, low + (rank + 1) * batch_size)
        counts = samples < NUM_IMAGES
        images = IMAGES[samples.clamp(max=NUM_IMAGES - 1)].clone()
        images[~counts] = 255
        yield EvaluationBatch(
            images=images,
            labels=torch.full((batch_size,), -1),
            samples=torch.where(counts, samples, -1),
            weights=counts.float(),
            skipped=(),
        )


def all_metrics(model: VAE, device: torch.device) -> list[Metric]:
    return [
        ImportanceMetric(model, device, num_samples=60, seed=3),
        ReconstructionMetric({"psnr_db": (psnr_db, 1)}, device),
        FrechetMetric(
            lambda images: images.flatten(1)[:, :5].double(),
            5,
            model,
            device,
            of_reconstructions=True,
            priors={"fid": None},
            seed=3,
        ),
    ]


def measured(kind: str, batch_size: int) -> EvaluationResult:
    """Figures of all metrics, on as many ranks as there are."""
    runtime = Runtime.start(RuntimeConfig(device="cpu", threads=1), precision="no")
    model = tiny_model(kind=kind)
    shares = batches(batch_size, rank=runtime.rank, world=runtime.world)
    metrics = all_metrics(model, runtime.device)
    result = evaluate(model, shares, runtime=runtime, seed=3, metrics=metrics)
    assert result is not None and result.num_images == NUM_IMAGES
    return result


@pytest.fixture
def runtime() -> Runtime:
    return Runtime.start(RuntimeConfig(device="cpu", threads=1), precision="no")


def run(model: VAE, runtime: Runtime, batch_size: int) -> EvaluationResult:
    result = evaluate(model, batches(batch_size), runtime=runtime, seed=3)
    assert result is not None
    return result


def test_figures_against_torch_distributions(runtime: Runtime) -> None:
    model = tiny_model()
    distortion = rate = 0.0
    with torch.no_grad():
        for sample, image_u8 in enumerate(IMAGES):
            uniform = torch.rand(1, 6, 5, generator=torch_generator(3, "eval-levels", sample))
            ink = (uniform < image_u8 / 255).double()
            mean, log_variance = model.encode(2 * ink.float()[None] - 1)
            posterior = Normal(mean.double(), (log_variance / 2).exp().double())
            prior = Normal(torch.zeros_like(posterior.mean), 1.0)
            noise = torch.randn(
                mean.shape[1:], generator=torch_generator(3, "eval-posterior", sample)
            )
            z = posterior.mean + posterior.stddev * noise
            logits = model.decode(z.float(), (6, 5)).double()
            distortion -= float(Independent(Bernoulli(logits=logits), 3).log_prob(ink[None]))
            rate += float(kl_divergence(posterior, prior).sum())
    result = run(model, runtime, batch_size=13)
    assert result.distortion_nats == pytest.approx(distortion / NUM_IMAGES, rel=1e-6)
    assert result.rate_nats == pytest.approx(rate / NUM_IMAGES, rel=1e-5)
    assert result.rate_nats > 1e-3
    assert result.neg_elbo_nats == pytest.approx((distortion + rate) / NUM_IMAGES, rel=1e-6)
    assert result.bits_per_dim == pytest.approx(result.neg_elbo_nats / (30 * math.log(2)))
    assert result.variance_at_floor_fraction is None


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_batches_padding_and_ranks_do_not_matter(kind: str) -> None:
    whole = measured(kind, 13)
    others = [measured(kind, 4)]
    if kind == "bernoulli":
        ranks = run_ranks(2, functools.partial(measured, kind, 2))
        assert ranks[0] == ranks[1]
        others.append(ranks[0])
    for other in others:
        assert other.figures() == pytest.approx(whole.figures(), rel=1e-5)
        assert other.row().keys() == whole.row().keys()


def test_bits_per_dim_of_a_density_count_8_bit_levels(runtime: Runtime) -> None:
    result = run(tiny_model(kind="gaussian"), runtime, 13)
    # x = (level + u) / 128 - 1: a level is 1/128 wide
    level_nats = result.neg_elbo_nats + 30 * math.log(128)
    assert result.bits_per_dim == pytest.approx(level_nats / (30 * math.log(2)))
    assert result.variance_at_floor_fraction == 0.0


def test_the_draws_belong_to_seed_and_sample(runtime: Runtime) -> None:
    model = tiny_model()
    assert run(model, runtime, 5) == run(model, runtime, 5)
    other = evaluate(model, batches(5), runtime=runtime, seed=4)
    assert other is not None
    assert other.neg_elbo_nats != run(model, runtime, 5).neg_elbo_nats


def test_row_has_the_names_that_scripts_rely_on(runtime: Runtime) -> None:
    row = run(tiny_model(), runtime, 13).row()
    assert set(row) == {
        "eval/neg_elbo_nats",
        "eval/rate_nats",
        "eval/distortion_nats",
        "eval/bits_per_dim",
        "eval/num_images",
        "eval/skipped_samples",
        "latent/active_units",
        "latent/active_fraction",
        "latent/posterior_variance",
        "latent/mutual_information_nats",
        "latent/kl_nats_per_unit",
    }


def test_it_stops_between_batches_when_asked(runtime: Runtime) -> None:
    answers = iter([False, True])
    model = tiny_model().train()
    result = evaluate(
        model, batches(4), runtime=runtime, seed=3, stop_requested=lambda: next(answers)
    )
    assert result is None
    assert model.training
    assert next(answers, None) is None


def test_nothing_to_evaluate_is_an_error(runtime: Runtime) -> None:
    padding = [batch._replace(weights=torch.zeros(4)) for batch in batches(4)]
    with pytest.raises(ConfigError, match="no image to evaluate on"):
        evaluate(tiny_model(), padding, runtime=runtime, seed=3)


def test_images_of_two_shapes_count_by_their_values(runtime: Runtime) -> None:
    """bits/dim of all is the mean of both weighted by values, nats per image by images."""
    model = tiny_model(latent="spatial", kind="gaussian")

    def of_shape(height: int, width: int, samples: list[int]) -> EvaluationBatch:
        generator = torch_generator(0, "shapes", height)
        shape = (len(samples), 1, height, width)
        return EvaluationBatch(
            images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            labels=torch.full((len(samples),), -1),
            samples=torch.tensor(samples),
            weights=torch.ones(len(samples)),
            skipped=(),
        )

    small, large = of_shape(6, 5, [0, 3, 4]), of_shape(8, 12, [1, 2])

    def measured_of(*shares: EvaluationBatch) -> EvaluationResult:
        metrics = [ImportanceMetric(model, runtime.device, num_samples=3, seed=3)]
        result = evaluate(model, shares, runtime=runtime, seed=3, metrics=metrics)
        assert result is not None
        return result

    both, first, second = (measured_of(*of) for of in ((small, large), (small,), (large,)))
    dims = 3 * 30, 2 * 96
    for name in ("bits_per_dim", "is_bits_per_dim"):
        one, two = first.figures()[name], second.figures()[name]
        expected = (one * dims[0] + two * dims[1]) / sum(dims)
        assert both.figures()[name] == pytest.approx(expected, rel=1e-6), name
    for name in ("neg_elbo_nats", "is_nll_nats", "rate_nats"):
        expected = (3 * first.figures()[name] + 2 * second.figures()[name]) / 5
        assert both.figures()[name] == pytest.approx(expected, rel=1e-6), name


def test_pictures_with_missing_pixels_are_not_compared(runtime: Runtime) -> None:
    model = tiny_model()
    masked = (
        batch._replace(masks=torch.ones(len(batch.images), 1, 6, 5, dtype=torch.uint8))
        for batch in batches(4)
    )
    metrics = all_metrics(model, runtime.device)
    result = evaluate(model, masked, runtime=runtime, seed=3, metrics=metrics)
    assert result is not None
    assert set(result.notes) == {"psnr_db", "rfid", "fid"}
    assert all("pixels are missing" in note for note in result.notes.values())
    assert "is_nll_nats" in result.measured and "psnr_db" not in result.measured


# results.json

CONDITIONS = {"importance_samples": 7, "prior": "10 Gaussians"}


def record(**figures: float) -> dict[str, Any]:
    figures = {"num_images": 4, "skipped_samples": 0, "neg_elbo_nats": 3.5, **figures}
    return {
        **{key: f"this {key}" for key in SAME},
        "figures": figures,
        "conditions": conditions_of(figures, **CONDITIONS),
        "notes": {},
        "metric_weights": {},
    }


def written(path: Path, earlier: dict[str, Any]) -> Path:
    path.write_bytes(as_json(earlier))
    return path


def test_what_was_not_measured_again_stays(tmp_path: Path) -> None:
    earlier = record(is_nll_nats=2.0, is_nll_gmm_nats=1.5, psnr_db=20.0, lpips=0.3)
    earlier["notes"] = {"psnr_db": "of 8 bits", "is_nll_nats": "few", "ms_ssim": "too small"}
    earlier["metric_weights"] = {"lpips": "a"}
    now = record(psnr_db=21.0, ssim=0.5)
    merged = merged_with_earlier(now, written(tmp_path / "r.json", earlier))
    assert merged["figures"] == {**earlier["figures"], **now["figures"]}
    assert merged["conditions"] == {
        "is_nll_nats": {"importance_samples": 7},
        "is_nll_gmm_nats": CONDITIONS,
    }
    assert merged["notes"] == {"is_nll_nats": "few", "ms_ssim": "too small"}
    assert merged["metric_weights"] == {"lpips": "a"}


@pytest.mark.parametrize("key", [*SAME, *COUNTS])
def test_nothing_stays_of_another_evaluation(tmp_path: Path, key: str) -> None:
    earlier, now = record(psnr_db=20.0), record(ssim=0.5)
    (earlier["figures"] if key in COUNTS else earlier)[key] = "another"
    assert merged_with_earlier(now, written(tmp_path / "r.json", earlier)) == now


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"figures": 3}', "{"])
def test_nothing_stays_of_what_is_no_record(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "r.json").write_text(text)
    assert merged_with_earlier(record(), path) == record()
    assert merged_with_earlier(record(), tmp_path / "none.json") == record()


def test_numbers_that_json_does_not_know_are_null() -> None:
    data = as_json({"a": float("nan"), "latents": {"std": [1.0, float("inf")], "n": 3}})
    assert json.loads(data, parse_constant=pytest.fail) == {
        "a": None,
        "latents": {"std": [1.0, None], "n": 3},
    }
