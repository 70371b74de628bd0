"""What tests of several rooms share: real digits as shards, few enough to be read in a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from vae_dist.cli import set_environment
from vae_dist.data.digits import make_digits

set_environment()  # before torch is imported: tests run beside each other, and in several processes


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled digits: `digits/train` in 8 shards, `digits/validation`. Not to be changed."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    make_digits(folder)
    return folder
