"""What `auto` becomes in a run that goes on, and what is refused there."""

import pytest
import yaml

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.run.checkpoint import Checkpoint
from vae_dist.run.folder import RunFolder
from vae_dist.run.resume import as_in_run_folder, is_finished
from vae_dist.training import setup


def made(kind):
    config = TrainConfig(config="photos64")
    config.perceptual.kind, config.training.precision = kind, "no"
    config.data.train, config.data.validation = "d/train", "d/validation"
    config.data.slots, config.data.window = 16, 32
    return config


def folder_of(path, config):
    folder = RunFolder(path)
    folder.create()
    folder.write_config(config)
    (folder.checkpoints.folder / "step_00000001").mkdir()
    return folder


@pytest.mark.parametrize("kind", ["structure", "lpips"])
def test_what_is_automatic_stays_that_of_the_run(tmp_path, kind):
    previous, again = made(kind), made("auto")
    previous.perceptual.weights = again.perceptual.weights = "weights"  # empty for structure
    again.data.slots, again.data.window, again.training.precision = 0, "auto", "auto"
    folder = folder_of(tmp_path, previous)
    assert folder.config() == previous
    assert as_in_run_folder(again, folder) == previous
    again.data.slots = 0  # those of the run: 16
    said = r"run=.*: 3 processes cannot share data\.slots=16 evenly; .* work are 1, 2, 4, 8, 16\."
    with pytest.raises(ConfigError, match=f"{said} .* multiple of 3"):
        setup._agreed_config(again, folder, world=3)


def test_what_the_run_never_had_is_not_taken_away_silently(tmp_path):
    folder, config = folder_of(tmp_path, made("none")), made("auto")
    old = yaml.safe_load(folder.config_path.read_text())
    del old["perceptual"], old["adversarial"], old["objective"]["latent_noise"]
    folder.config_path.write_text(yaml.safe_dump(old))  # from before these keys were there
    assert as_in_run_folder(made("none"), folder) == made("none")
    with pytest.raises(ConfigError, match=r"perceptual\.kind"):
        as_in_run_folder(config, folder)
    config.resume.allow_changes = True
    assert as_in_run_folder(config, folder).perceptual.kind == "auto"


def test_a_run_is_finished_once_its_last_step_is_evaluated():
    config = made("none")
    config.training.steps = 8
    cases = {(8, 8): True, (8, 6): False, (8, -1): False, (9, 6): True, (6, 6): False}
    for (step, evaluated), expected in cases.items():
        state = {"scalars": {"evaluated_step": evaluated}}
        assert is_finished(config, Checkpoint(step, {}, state)) is expected
