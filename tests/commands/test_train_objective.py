"""The added terms through the real `train` command: what is printed, stored, logged and refused."""

import shutil

import pytest
import torch

import vae_dist
from tests.support.training import arguments, rows, weights
from vae_dist.config.load import from_yaml
from vae_dist.models.build import build_vae
from vae_dist.run.checkpoint import load_checkpoint
from vae_dist.run.resume import initial_weights
from vae_dist.train import main

OPTIONS = (
    *("training.steps=4", "optimizer.warmup_steps=1", "evaluation.every=0"),
    *("model.latent=spatial", "model.latent_channels=3", "likelihood.kind=gaussian"),
)
ADVERSARIAL = (
    *("adversarial.weight=0.5", "adversarial.warmup_steps=1"),
    *("adversarial.channels=8", "adversarial.layers=2"),
)


@pytest.fixture(scope="module")
def first(tmp_path_factory, digits):
    run = tmp_path_factory.mktemp("first") / "run"
    assert main(arguments(run, digits, *OPTIONS)) == 0
    return run


def test_auto_is_structure_where_no_weights_are_and_is_stored(tmp_path, digits, capfd):
    run = tmp_path / "run"
    keys = arguments(run, digits, *OPTIONS, "perceptual.kind=auto", f"perceptual.weights={run}")
    assert main([*keys, "training.steps=2"]) == 0
    assert "beside the bound: perceptual structure x 1" in capfd.readouterr().out
    assert from_yaml((run / "config.yaml").read_bytes()).perceptual.kind == "structure"
    assert rows(run)[2]["train/perceptual"] > 0
    assert main([*keys, "training.steps=3"]) == 0  # it goes on with what it chose
    assert sorted(rows(run)) == [1, 2, 3]


def test_a_decoder_is_fine_tuned_for_an_encoder_that_stays(first, tmp_path, digits):
    fine_tuned = (*ADVERSARIAL, f"init_from={first}", "training.train_only=decoder")
    assert main(arguments(tmp_path / "run", digits, *OPTIONS, *fine_tuned)) == 0
    before, after = weights(first, 4, "ema"), weights(tmp_path / "run", 4)
    for name, value in before.items():
        is_kept = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(value, after[name]) == is_kept, name
    assert rows(tmp_path / "run")[4]["train/adversarial"] != 0
    assert not any(name.startswith("discriminator/") for name in after)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("adversarial.weight=0.5 adversarial.layers=4", "layers=4 needs images of 48 pixels"),
        ("objective.scale_equivariance=0.5", "objective.scale_equivariance needs images of 32"),
    ],
)
def test_images_that_are_too_small_are_refused(tmp_path, digits, capfd, options, words):
    more = (*options.split(), "model.channels=[8, 8, 8, 8]")
    assert main(arguments(tmp_path / "run", digits, *OPTIONS, *more)) == 2
    assert words in capfd.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_discriminator_that_joins_a_run_learns_before_it_is_heard(first, tmp_path, digits, capfd):
    run = shutil.copytree(first, tmp_path / "run")
    more = (*ADVERSARIAL, "adversarial.warmup_steps=2", "resume.allow_changes=true")
    keys = arguments(run, digits, *OPTIONS, *more, "training.steps=8")
    assert main(keys) == 2
    words = "step 4 has no discriminator, and adversarial.start_step=0 lies before it"
    assert words in capfd.readouterr().err
    assert main([*keys, "adversarial.start_step=4"]) == 0
    assert "train/discriminator_loss" in rows(run)[5]
    assert rows(run)[6]["optim/adversarial_weight"] == 0 < rows(run)[8]["optim/adversarial_weight"]


def test_a_second_stage_begins_with_the_discriminator_of_the_first(tmp_path, digits, capfd):
    first, second = tmp_path / "first", tmp_path / "second"
    both = (*OPTIONS, *ADVERSARIAL, "training.steps=2")
    assert main(arguments(first, digits, *both)) == 0
    assert main(arguments(second, digits, *both, f"init_from={first}")) == 0
    assert f"discriminator: that of {first}" in capfd.readouterr().out
    stored = load_checkpoint(first / "checkpoints", "latest").tensors["discriminator"]

    def begun_with(*keys):
        config = vae_dist.config(*arguments(second, digits, *OPTIONS, f"init_from={first}", *keys))
        weights = initial_weights(config, build_vae(config, (28, 28)))
        return {k: v for k, v in weights.items() if k.startswith("discriminator/")}

    found = begun_with(*ADVERSARIAL)
    assert found and found.keys() == {f"discriminator/{name}" for name in stored}
    assert all(torch.equal(found[f"discriminator/{name}"], v) for name, v in stored.items())
    for keys in ((*ADVERSARIAL, "adversarial.channels=16"), ()):  # of another shape, or none
        assert not begun_with(*keys)
