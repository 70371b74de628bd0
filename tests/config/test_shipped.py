"""Every YAML file that ships loads, passes the checks, and stays short."""

from __future__ import annotations

from pathlib import Path

import pytest

from vae_dist.config.load import load_train_config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def test_the_configs_that_the_documentation_names_ship() -> None:
    assert {"debug", "mnist", "celeba64"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_shipped_config_is_sound(path: Path) -> None:
    config = load_train_config([f"config={path}"])
    assert config.run == f"runs/{path.stem}"
    lines = path.read_text().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
