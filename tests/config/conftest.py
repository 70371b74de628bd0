"""A working folder with configs/plain.yaml, a sound config; the shipped ones are out of sight."""

from pathlib import Path

import pytest

from vae_dist.config import load
from vae_dist.config.schema import TrainConfig

DATA = "data:\n  train: shards/train\n  validation: shards/validation\n"


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "PACKAGE", tmp_path / "installed")
    write("configs/plain.yaml", DATA)
    return tmp_path


def sound(**values):
    """A sound config with `section__key=value` changes."""
    made = TrainConfig(config="plain", run="runs/plain")
    made.data.train, made.data.validation = "shards/train", "shards/validation"
    for name, value in values.items():
        section, _, leaf = name.partition("__")
        assert hasattr(getattr(made, section), leaf)
        setattr(getattr(made, section), leaf, value)
    return made
