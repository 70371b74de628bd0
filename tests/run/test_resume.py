"""What `auto` becomes in a run that goes on, and runs from before a key was there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.run.folder import RunFolder
from vae_dist.run.resume import as_in_run_folder


def folder_of(path: Path, config: TrainConfig) -> RunFolder:
    folder = RunFolder(path)
    folder.create()
    folder.write_config(config)
    (folder.checkpoints.folder / "step_00000001").mkdir(parents=True)
    return folder


def made(kind: str) -> TrainConfig:
    config = TrainConfig()
    config.config, config.perceptual.kind = "photos64", kind  # type: ignore[assignment]
    config.data.train, config.data.validation = "d/train", "d/validation"
    config.data.slots, config.data.window = 16, 32
    config.training.precision = "no"
    return config


@pytest.mark.parametrize("kind", ["structure", "lpips"])
def test_an_automatic_perceptual_kind_stays_that_of_the_run(tmp_path: Path, kind: str) -> None:
    folder = folder_of(tmp_path, made(kind))
    assert as_in_run_folder(made("auto"), folder).perceptual.kind == kind


def test_a_perceptual_term_that_the_run_never_had_is_not_taken_away_silently(
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path, made("none"))
    with pytest.raises(ConfigError, match=r"perceptual\.kind"):
        as_in_run_folder(made("auto"), folder)
    config = made("auto")
    config.resume.allow_changes = True
    assert as_in_run_folder(config, folder).perceptual.kind == "auto"


def test_a_run_from_before_the_added_terms_goes_on(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, made("none"))
    old = yaml.safe_load(folder.config_path.read_text())
    for section in ("perceptual", "adversarial"):
        del old[section]
    for section, key in (
        ("objective", "scale_equivariance"),
        ("objective", "latent_noise"),
        ("training", "train_only"),
        ("model", "initial_sigma"),
        ("model", "dc_shortcuts"),
        ("runtime", "compile"),
        ("data", "cache_bytes"),
    ):
        del old[section][key]
    folder.config_path.write_text(yaml.safe_dump(old))
    assert as_in_run_folder(made("none"), folder) == made("none")


def test_a_folder_of_weights_without_any_leaves_a_run_that_is_read_again(tmp_path: Path) -> None:
    """perceptual.kind=auto perceptual.weights=EMPTY becomes structure, which has no weights."""
    config = made("structure")
    config.perceptual.weights = "weights"
    folder = folder_of(tmp_path, config)
    assert folder.config() == config
    again = made("auto")
    again.perceptual.weights = "weights"
    assert as_in_run_folder(again, folder) == config


def test_a_config_that_is_lost_is_named(tmp_path: Path) -> None:
    folder, config = folder_of(tmp_path, made("structure")), made("structure")
    folder.config_path.unlink()
    with pytest.raises(ConfigError, match=r"config.yaml is lost, and 1 checkpoints are there"):
        folder.config()
    with pytest.raises(ConfigError, match=r"resume.allow_changes=true"):
        as_in_run_folder(config, folder)
    config.resume.allow_changes = True
    assert as_in_run_folder(config, folder) is config
