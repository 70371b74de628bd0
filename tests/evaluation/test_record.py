"""The record of an evaluation: what stays of an earlier one, and that it is JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vae_dist.evaluation.run import COUNTS, SAME, as_json, conditions_of, merged_with_earlier

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
