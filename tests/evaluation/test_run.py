"""The bound against torch.distributions, what it may not depend on, and results.json."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from tests.support.distributed import run_ranks
from tests.support.evaluated import (
    CPU,
    IMAGES,
    NUM_IMAGES,
    all_metrics,
    batch_of,
    batches,
    result_of,
    start,
    tiny_model,
)
from vae_dist.config.errors import ConfigError
from vae_dist.data.reader import SkippedSample
from vae_dist.evaluation.importance import ImportanceMetric
from vae_dist.evaluation.run import (
    COUNTS,
    SAME,
    EvaluationResult,
    as_json,
    evaluate,
    merged_with_earlier,
)
from vae_dist.randomness import torch_generator


def measured(kind: str, batch_size: int) -> EvaluationResult:
    model = tiny_model(kind=kind)
    return result_of(model, *all_metrics(model), batch_size=batch_size)


def test_figures_against_torch_distributions() -> None:
    model = tiny_model()
    distortion = rate = 0.0
    with torch.no_grad():
        for sample, image_u8 in enumerate(IMAGES):
            uniform = torch.rand(1, 6, 5, generator=torch_generator(3, "eval-levels", sample))
            ink = (uniform < image_u8 / 255).double()
            mean, log_variance = model.encode(2 * ink.float()[None] - 1)
            posterior = Normal(mean.double(), (log_variance / 2).exp().double())
            prior = Normal(torch.zeros_like(posterior.mean), 1.0)
            generator = torch_generator(3, "eval-posterior", sample)
            z = posterior.mean + posterior.stddev * torch.randn(3, generator=generator)
            logits = model.decode(z.float(), (6, 5)).double()
            distortion -= float(Independent(Bernoulli(logits=logits), 3).log_prob(ink[None]))
            rate += float(kl_divergence(posterior, prior).sum())
    result = result_of(model)
    found = result.figures
    assert found["distortion_nats"] == pytest.approx(distortion / NUM_IMAGES, rel=1e-6)
    assert found["rate_nats"] == pytest.approx(rate / NUM_IMAGES, rel=1e-5) and rate > 1e-3
    assert found["neg_elbo_nats"] == pytest.approx((distortion + rate) / NUM_IMAGES, rel=1e-6)
    assert found["bits_per_dim"] == pytest.approx(found["neg_elbo_nats"] / (30 * math.log(2)))
    assert set(result.row()) == {  # names that scripts rely on
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


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_batches_padding_and_ranks_do_not_matter(kind: str) -> None:
    whole = measured(kind, 13)
    others = [measured(kind, 4)]
    if kind == "bernoulli":
        ranks = run_ranks(2, functools.partial(measured, kind, 2))
        assert ranks[0] == ranks[1]
        others.append(ranks[0])
    for other in others:
        assert other.figures == pytest.approx(whole.figures, rel=1e-5)
        assert other.row().keys() == whole.row().keys()


def test_bits_per_dim_of_a_density_count_8_bit_levels() -> None:
    found = result_of(tiny_model(kind="gaussian")).figures
    # x = (level + u) / 128 - 1: a level is 1/128 wide
    level_nats = found["neg_elbo_nats"] + 30 * math.log(128)
    assert found["bits_per_dim"] == pytest.approx(level_nats / (30 * math.log(2)))
    assert found["variance_at_floor_fraction"] == 0.0


def test_the_draws_belong_to_seed_and_sample() -> None:
    model = tiny_model()
    assert result_of(model, batch_size=5) == result_of(model, batch_size=5)
    assert result_of(model, seed=4).figures != result_of(model).figures


def test_it_stops_between_batches_when_asked() -> None:
    answers, model = iter([False, True]), tiny_model().train()
    shares, stop = batches(4), lambda: next(answers)
    assert evaluate(model, shares, runtime=start(), seed=3, stop_requested=stop) is None
    assert model.training and next(answers, None) is None


@pytest.mark.parametrize(("num_lost", "limit"), [(4, 0.3), (13, 1.0)])
def test_too_many_lost_images_are_an_error(num_lost: int, limit: float) -> None:
    """As in training: above data.max_skipped_fraction, or where there is none at all."""

    def damaged(batch: Any) -> Any:
        lost = batch.samples < num_lost
        skipped = [SkippedSample("a.tar", int(n), "no PNG", None) for n in batch.samples[lost]]
        return batch._replace(weights=torch.where(lost, 0.0, batch.weights), skipped=skipped)

    model, sentence = tiny_model(), f"{num_lost} of 13 images .* a.tar sample 0: no PNG"
    with pytest.raises(ConfigError, match=sentence):
        result_of(model, change=damaged, max_skipped_fraction=limit)
    if num_lost == 4:
        found = result_of(model, change=damaged, max_skipped_fraction=0.31).figures
        assert (found["num_images"], found["skipped_samples"]) == (9, 4)


def test_images_of_two_shapes_count_by_their_values() -> None:
    """bits/dim of all is the mean of both weighted by values, nats per image by images."""
    model = tiny_model(latent="spatial", kind="gaussian")

    def of_shape(height: int, width: int, samples: list[int]) -> Any:
        shape, generator = (len(samples), 1, height, width), torch_generator(0, "shapes", height)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return batch_of(images, samples)

    def figures_of(*shares: Any) -> dict[str, float]:
        metrics = [ImportanceMetric(model, CPU, num_samples=3, seed=3)]
        result = evaluate(model, shares, runtime=start(), seed=3, metrics=metrics)
        assert result is not None
        return result.figures

    small, large = of_shape(6, 5, [0, 3, 4]), of_shape(8, 12, [1, 2])
    both, first, second = figures_of(small, large), figures_of(small), figures_of(large)
    for names, (one, two) in (
        (("bits_per_dim", "is_bits_per_dim"), (3 * 30, 2 * 96)),
        (("neg_elbo_nats", "is_nll_nats", "rate_nats"), (3, 2)),
    ):
        for name in names:
            expected = (first[name] * one + second[name] * two) / (one + two)
            assert both[name] == pytest.approx(expected, rel=1e-6), name


def test_pictures_with_missing_pixels_are_not_compared() -> None:
    model, mask = tiny_model(), torch.ones(4, 1, 6, 5, dtype=torch.uint8)
    masked = functools.partial(type(next(batches(4)))._replace, masks=mask)
    result = result_of(model, *all_metrics(model), batch_size=4, change=masked)
    assert set(result.notes) == {"psnr_db", "rfid", "fid"}
    assert all("pixels are missing" in note for note in result.notes.values())
    assert "is_nll_nats" in result.figures and "psnr_db" not in result.figures


# results.json


def record(**figures: float) -> dict[str, Any]:
    figures = {"num_images": 4, "skipped_samples": 0, "neg_elbo_nats": 3.5, **figures}
    conditions = {name: {"importance_samples": 7} for name in figures if name[:3] == "is_"}
    same = {key: f"this {key}" for key in SAME}
    return same | {
        "figures": figures,
        "conditions": conditions,
        "notes": {},
        "metric_weights": {},
    }


def written(path: Path, earlier: dict[str, Any]) -> Path:
    path.write_bytes(as_json(earlier))
    return path


def test_what_was_not_measured_again_stays(tmp_path: Path) -> None:
    earlier = record(is_nll_nats=2.0, psnr_db=20.0, lpips=0.3)
    earlier["notes"] = {"psnr_db": "of 8 bits", "is_nll_nats": "few", "ms_ssim": "too small"}
    earlier["metric_weights"] = {"lpips": "a"}
    now = record(psnr_db=21.0, ssim=0.5)
    merged = merged_with_earlier(now, written(tmp_path / "r.json", earlier))
    assert merged["figures"] == {**earlier["figures"], **now["figures"]}
    assert merged["conditions"] == {"is_nll_nats": {"importance_samples": 7}}
    assert merged["notes"] == {"is_nll_nats": "few", "ms_ssim": "too small"}
    assert merged["metric_weights"] == {"lpips": "a"}


@pytest.mark.parametrize("key", [*SAME, *COUNTS])
def test_nothing_stays_of_another_evaluation(tmp_path: Path, key: str) -> None:
    earlier, now = record(psnr_db=20.0), record(ssim=0.5)
    (earlier["figures"] if key in COUNTS else earlier)[key] = "another"
    assert merged_with_earlier(now, written(tmp_path / "r.json", earlier)) == now


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"figures": 3}', "{", "[" * 10**5])
def test_nothing_stays_of_what_is_no_record(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "r.json").write_text(text)
    assert merged_with_earlier(record(), path) == record()
    assert merged_with_earlier(record(), tmp_path / "none.json") == record()


def test_numbers_that_json_does_not_know_are_null() -> None:
    data = as_json({"a": float("nan"), "latents": {"std": [1.0, float("inf")], "n": 3}})
    found = json.loads(data, parse_constant=pytest.fail)
    assert found == {"a": None, "latents": {"std": [1.0, None], "n": 3}}
