"""A working folder with configs/plain.yaml, a sound config; the shipped ones are out of sight."""

from pathlib import Path

import pytest

from vae_dist.config import commands
from vae_dist.config import load as load_module
from vae_dist.config.load import load_command, load_train_config

DATA = "data:\n  train: shards/train\n  validation: shards/validation\n"


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, errors="surrogateescape")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load_module, "PACKAGE", tmp_path / "installed")
    write("configs/plain.yaml", DATA)


def load(*words):
    """The plain config with these settings; that of another command if the first word names it."""
    if words and (cls := getattr(commands, f"{words[0].capitalize()}Command", None)):
        return load_command(cls, list(words[1:]))
    return load_train_config(["config=plain", *words])
