"""`latents.json` of a run folder: written by training and by `evaluate`, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.distributed import run_ranks
from tests.support.latent_data import write_photos, write_spatial_run
from tests.support.training import train
from vae_dist import evaluate
from vae_dist.config.commands import EvaluateCommand
from vae_dist.inference.load import first_examples_by_shape, load_model, open_images
from vae_dist.inference.sampling import posteriors


def read(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "latents.json").read_text())
    return found


def test_evaluate_measures_each_image_once_on_any_number_of_ranks(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 7, sizes=[(20, 16)])
    run = write_spatial_run(tmp_path / "run", tmp_path / "photos", kind="discretized_gaussian")
    keys = [f"run={run}", "device=cpu", "threads=1", "batch_size=2"]
    assert evaluate.main(keys) == 0
    alone = read(run)
    assert run_ranks(2, evaluate.main, keys) == [0, 0]
    together = read(run)
    assert together["scaling_factor"] == pytest.approx(alone["scaling_factor"], rel=1e-6)
    assert together["per_channel"]["mean"] == pytest.approx(alone["per_channel"]["mean"], rel=1e-5)
    assert (alone["num_images"], together["num_images"]) == (7, 7)
    command = EvaluateCommand(run=str(run), device="cpu")
    loaded = load_model(command)
    (examples,) = first_examples_by_shape(open_images(loaded.config, "", create=False), 7)
    mean, log_variance = posteriors(loaded.model, examples.images)
    variance = mean.double().var(correction=0) + log_variance.double().exp().mean()
    assert alone["scaling_factor"] == pytest.approx(float(variance) ** -0.5, rel=1e-5)
    assert alone["shift_factor"] == pytest.approx(float(mean.double().mean()), rel=1e-5)


def test_only_results_that_describe_the_run_replace_the_file(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 3, sizes=[(20, 16)])
    run = write_spatial_run(tmp_path / "run", tmp_path / "photos")
    for keys in (["checkpoint=10"], ["weights=model"], [f"out={tmp_path}/r.json"]):
        assert evaluate.main([f"run={run}", "device=cpu", *keys]) == 0
        assert not (run / "latents.json").exists()
    record = json.loads((tmp_path / "r.json").read_text())["latents"]
    assert record["num_images"] == 3 and record["scaling_factor"] > 0


def test_training_leaves_those_of_its_last_step(tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    spatial = ("model.latent=spatial", "model.latent_channels=2", "training.steps=4")
    assert train(run, digits, *spatial, "evaluation.every=0") == [0]
    record = read(run)
    assert (record["step"], record["weights"], record["num_images"]) == (4, "ema", 1000)
    assert len(record["per_channel"]["std"]) == 2
    assert evaluate.main([f"run={run}", "device=cpu", "threads=1"]) == 0
    again = read(run)
    torch.testing.assert_close(again["per_channel"], record["per_channel"], rtol=1e-4, atol=1e-4)


def test_a_vector_latent_has_none(tmp_path: Path, digits: Path) -> None:
    assert train(tmp_path / "run", digits, "training.steps=2", "evaluation.every=0") == [0]
    assert not (tmp_path / "run" / "latents.json").exists()
