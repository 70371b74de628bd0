"""From a run folder to a model, and to the images that it is shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny_run import tiny_config, write_images, write_run
from vae_dist.config.commands import RunCommand
from vae_dist.config.errors import ConfigError
from vae_dist.inference.load import check_image_size, first_examples, load_model, open_images


def command(run: Path, **keys: str) -> RunCommand:
    return RunCommand(run=str(run), device="cpu", **keys)  # type: ignore[arg-type]


def test_the_newest_averaged_weights_are_the_default(plain_run: Path) -> None:
    loaded = load_model(command(plain_run))
    assert (loaded.step, loaded.image_size, loaded.model.training) == (20, (28, 28), False)
    weights = {}
    for checkpoint in ("10", "20"):
        for kind in ("ema", "model"):
            model = load_model(command(plain_run, checkpoint=checkpoint, weights=kind)).model
            weights[checkpoint, kind] = model.encoder.conv_in.weight
    assert torch.equal(loaded.model.encoder.conv_in.weight, weights["20", "ema"])
    assert len({tensor.sum().item() for tensor in weights.values()}) == 4


def test_what_cannot_be_loaded_is_named(plain_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint=15 .*latest, 10, 20"):
        load_model(command(plain_run, checkpoint="15"))
    run = write_run(tmp_path, tiny_config(), (8, 6))
    config = run.config()
    config.model.channels = [8, 16]
    run.write_config(config)
    with pytest.raises(ConfigError, match=r"do not fit the model of its config\.yaml"):
        load_model(command(tmp_path))


def test_images_come_from_the_validation_shards_or_those_given(tmp_path: Path) -> None:
    pixels = np.full((4, 8, 6), 10, np.uint8)
    pixels[1] = 0  # written as no PNG
    write_images(tmp_path / "a", pixels)
    write_images(tmp_path / "b", np.full((3, 8, 6), 20, np.uint8))
    config = tiny_config()
    config.data.validation = str(tmp_path / "a")
    for data, level in (("", 10), (str(tmp_path / "b"), 20)):
        images = first_examples(open_images(config, data, create=True), 100).images
        assert images.shape == (3, 1, 8, 6)  # unreadable ones are left out
        assert (images == level).all()
    with pytest.raises(ConfigError, match="data="):
        open_images(config, str(tmp_path / "c"), create=True)


def test_a_vector_latent_is_bound_to_its_size(plain_run: Path) -> None:
    model = load_model(command(plain_run)).model
    check_image_size(model, (28, 28), key="resolution=trained")
    with pytest.raises(ConfigError, match=r"resolution=9.*9x9 pixels.*28x28 only"):
        check_image_size(model, (9, 9), key="resolution=9")
