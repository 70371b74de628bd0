"""The added terms through the real `train` command: what is printed, stored, logged and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vae_dist
from tests.support.training import arguments, rows, train, weights
from vae_dist.config.load import from_yaml
from vae_dist.models.build import build_vae
from vae_dist.run.checkpoint import load_checkpoint
from vae_dist.run.resume import initial_weights

OPTIONS = (
    "training.steps=4",
    "optimizer.warmup_steps=1",
    "evaluation.every=0",
    "model.latent=spatial",
    "model.latent_channels=3",
    "likelihood.kind=gaussian",
)


def test_auto_is_structure_where_no_weights_are_and_is_stored(
    tmp_path: Path, digits: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = (*OPTIONS, "perceptual.kind=auto", f"perceptual.weights={tmp_path}")
    assert train(run, digits, *options) == [0]
    assert "beside the bound: perceptual structure x 1" in capfd.readouterr().out
    assert from_yaml((run / "config.yaml").read_bytes()).perceptual.kind == "structure"
    assert rows(run)[4]["train/perceptual"] > 0
    assert train(run, digits, *options, "training.steps=6") == [0]  # it goes on with what it chose
    assert sorted(rows(run)) == [1, 2, 3, 4, 5, 6]


def test_a_decoder_is_fine_tuned_for_an_encoder_that_stays(
    tmp_path: Path, digits: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(first, digits, *OPTIONS) == [0]
    fine_tuned = (
        f"init_from={first}",
        "training.train_only=decoder",
        "adversarial.weight=0.5",
        "adversarial.warmup_steps=1",
        "adversarial.channels=8",
        "adversarial.layers=2",
    )
    assert train(second, digits, *OPTIONS, *fine_tuned) == [0]
    assert "decoder alone: encoder, quant_conv and label embedding" in capfd.readouterr().out
    before, after = weights(first, 4, "ema"), weights(second, 4)
    for name, value in before.items():
        is_kept = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(value, after[name]) == is_kept, name
    assert rows(second)[4]["train/adversarial"] != 0
    assert "discriminator/" not in " ".join(after)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("adversarial.weight=0.5", "adversarial.layers=4 needs images of 48 pixels"),
        ("objective.scale_equivariance=0.5", "objective.scale_equivariance needs images of 32"),
    ],
)
def test_images_that_are_too_small_are_refused_before_training(
    tmp_path: Path, digits: Path, capfd: pytest.CaptureFixture[str], option: str, words: str
) -> None:
    run = tmp_path / "run"
    more = ["adversarial.layers=4", "adversarial.warmup_steps=1"] if "adv" in option else []
    channels = "model.channels=[8, 8, 8, 8]"
    assert train(run, digits, *OPTIONS, option, *more, channels) == [2]
    assert words in capfd.readouterr().err
    assert not (run / "checkpoints").exists()


def test_a_dry_run_counts_the_discriminator(
    tmp_path: Path, digits: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ("adversarial.weight=0.5", "adversarial.warmup_steps=1", "adversarial.channels=8")
    options = (*OPTIONS, *more, "adversarial.layers=2", "dry_run=true")
    assert train(tmp_path / "run", digits, *options) == [0]
    said = capfd.readouterr().out
    # 4x4 kernels, 1 -> 8 -> 16 -> 32 -> 1 channels, two norms, first and last bias
    count = 16 * (8 + 8 * 16 + 16 * 32 + 32) + 2 * (16 + 32) + 8 + 1
    assert f"discriminator {count:,}" in said
    assert "of tensors: weights" in said


def test_a_discriminator_that_joins_a_run_learns_before_it_is_heard(
    tmp_path: Path, digits: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run, digits, *OPTIONS) == [0]
    more = ("adversarial.weight=0.5", "adversarial.warmup_steps=2", "adversarial.channels=8")
    joined = (*more, "adversarial.layers=2", "resume.allow_changes=true")
    options = (*OPTIONS, *joined)
    assert train(run, digits, *options, "training.steps=8") == [2]
    words = "step 4 has no discriminator, and adversarial.start_step=0 lies before it"
    assert words in capfd.readouterr().err
    assert train(run, digits, *options, "training.steps=8", "adversarial.start_step=4") == [0]
    assert "train/discriminator_loss" in rows(run)[5]
    assert rows(run)[6]["optim/adversarial_weight"] == 0 < rows(run)[8]["optim/adversarial_weight"]


def test_a_second_stage_begins_with_the_discriminator_of_the_first(
    tmp_path: Path, digits: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adversarial = (
        "adversarial.weight=0.5",
        "adversarial.warmup_steps=1",
        "adversarial.channels=8",
        "adversarial.layers=2",
    )
    first = tmp_path / "first"
    assert train(first, digits, *OPTIONS, *adversarial) == [0]
    assert train(tmp_path / "second", digits, *OPTIONS, *adversarial, f"init_from={first}") == [0]
    assert f"discriminator: that of {first}" in capfd.readouterr().out
    keys = [*arguments(first, digits, *OPTIONS, *adversarial), f"init_from={first}"]
    config = vae_dist.config(*keys)
    found = initial_weights(config, build_vae(config, (28, 28)))
    stored = load_checkpoint(first / "checkpoints", "latest").tensors["discriminator"]
    assert stored
    assert all(torch.equal(found[f"discriminator/{name}"], v) for name, v in stored.items())
    without = [*arguments(first, digits, *OPTIONS), f"init_from={first}"]
    for others in ([*keys, "adversarial.channels=16"], without):  # of another shape, or none
        config = vae_dist.config(*others)
        found = initial_weights(config, build_vae(config, (28, 28)))
        assert not any(name.startswith("discriminator/") for name in found)
