"""A working folder with configs/plain.yaml, a sound config; the shipped ones are out of sight."""

from __future__ import annotations

from pathlib import Path

import pytest

from vae_dist.config import load

DATA = "data:\n  train: shards/train\n  validation: shards/validation\n"


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "PACKAGE", tmp_path / "installed")
    write("configs/plain.yaml", DATA)
    return tmp_path
