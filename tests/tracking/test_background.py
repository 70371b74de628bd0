from __future__ import annotations

import threading
from pathlib import Path

import torch
from PIL import Image

from vae_dist.tracking import background
from vae_dist.tracking.background import Picture, PictureWriter
from vae_dist.tracking.images import grid


class Heard:
    def __init__(self) -> None:
        self.pictures: list[tuple[int, str, Path, str]] = []

    def log(self, step, row):
        raise AssertionError

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.pictures.append((step, key, png_path, caption))

    def close(self, status):
        raise AssertionError


def draw() -> Image.Image:
    return grid(torch.zeros(1, 1, 8, 8))


def test_pictures_are_written_before_close_returns(tmp_path: Path) -> None:
    heard = Heard()
    writer = PictureWriter(tmp_path, [heard], say=print)
    for step in (10, 20):
        writer.put(Picture(step, "samples", f"step {step}", draw()))
    writer.close()
    paths = [tmp_path / "samples_00000010.png", tmp_path / "samples_00000020.png"]
    assert all(path.exists() for path in paths)
    assert heard.pictures == [
        (10, "images/samples", paths[0], "step 10"),
        (20, "images/samples", paths[1], "step 20"),
    ]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    heard = Heard()
    writer = PictureWriter(tmp_path / "file", [heard], say=said.append)
    writer.put(Picture(10, "samples", "", draw()))
    writer.close()
    assert len(said) == 1 and "samples of step 10 is not written" in said[0]
    assert heard.pictures == []


def test_a_slow_disk_never_blocks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(background, "_QUEUED_PICTURES", 1)
    go_on = threading.Event()
    said: list[str] = []

    save = background.save_png

    def slowly(image: Image.Image, path: Path) -> Path:
        go_on.wait(10)
        return save(image, path)

    monkeypatch.setattr(background, "save_png", slowly)
    writer = PictureWriter(tmp_path, [], say=said.append)
    for step in range(5):
        writer.put(Picture(step, "samples", "", draw()))
    assert len(said) >= 3 and "disk too slow" in said[0]
    go_on.set()
    writer.close()
