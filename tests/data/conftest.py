"""Small shards whose images say who they are: pixels (shard, index // 256, index % 256)."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vae_dist.data import sources
from vae_dist.data.indexing import write_info
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import write_shards

LENGTHS = (0, 1, 7, 30, 2, 45, 19, 5, 1, 12)


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def marked_png(shard: int, index: int) -> bytes:
    return png(np.array([[shard, index // 256, index % 256]], np.uint8))


def identities(images: np.ndarray) -> list[tuple[int, int]]:
    """(shard, index) of each of the images (b, 1, 1, 3)."""
    return [(int(s), 256 * int(high) + int(low)) for s, high, low in images.reshape(-1, 3)]


def make_shards(folder: Path, lengths: Sequence[int] = LENGTHS) -> None:
    """One tar for each length, with sidecars, in a folder of their own."""
    folder.mkdir()
    for shard, length in enumerate(lengths):
        samples = (
            {"__key__": f"{i:04d}", "png": marked_png(shard, i), "cls": str(shard).encode()}
            for i in range(length)
        )
        (written,) = write_shards(samples, folder / "part", num_shards=1)
        for suffix in ("", ".idx"):
            Path(f"{written}{suffix}").rename(folder / f"set-{shard:02d}.tar{suffix}")
        shutil.rmtree(folder / "part")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards") / "set"
    make_shards(folder)
    return str(folder)


@pytest.fixture
def marked() -> ImageSettings:
    return ImageSettings(channels=1, size=(1, 3), resize=False, max_pixels=100)


@pytest.fixture
def copied(shards: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which no test waits for: its clock has only them."""
    waited: list[float] = []
    monkeypatch.setattr(sources, "sleep", waited.append)
    monkeypatch.setattr(sources, "clock", lambda: sum(waited))
    return waited


@pytest.fixture
def folder(copied: Path) -> Path:
    """Shards with sidecars and `_info.json`, to be served."""
    write_info(sorted(copied.glob("*.tar")), split="train")
    return copied
