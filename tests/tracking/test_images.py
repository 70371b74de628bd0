from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vae_dist.tracking import images
from vae_dist.tracking.images import (
    ImageWriter,
    enlargement,
    find_images,
    grid,
    image_caption,
    save_png,
    side_by_side,
    single,
    to_uint8,
)


def flat(levels: list[int], *, channels: int = 1, size: int = 28) -> torch.Tensor:
    """Images of one level each, uint8."""
    values = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1)
    return values.expand(-1, channels, size, size)


def test_to_uint8_inverts_the_scaling_of_all_levels() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1.0), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize(("size", "factor"), [(28, 3), (32, 3), (48, 2), (64, 1), (1024, 1)])
def test_small_images_are_enlarged_by_whole_factors(size: int, factor: int) -> None:
    assert enlargement(size, size) == factor


def test_grid_places_images_row_by_row() -> None:
    picture = np.asarray(grid(flat([10, 20, 30, 40, 50]), columns=3))
    pitch = 84 + 2  # 28 pixels three times, and a line of two
    assert picture.shape == (2 * pitch + 2, 3 * pitch + 2)
    centres = picture[44::pitch, 44::pitch]
    ground = picture[0, 0]
    assert centres.tolist() == [[10, 20, 30], [40, 50, ground]]
    assert (picture[:, [0, 1, pitch, pitch + 1]] == ground).all()


def test_enlargement_repeats_pixels_without_blending() -> None:
    image = torch.randint(0, 256, (1, 3, 28, 20), dtype=torch.uint8)
    picture = np.asarray(grid(image))
    inner = picture[2:-2, 2:-2]
    assert inner.shape == (84, 60, 3)
    assert (inner[1::3, 1::3] == image[0].permute(1, 2, 0).numpy()).all()
    assert (inner[0::3, 2::3] == inner[2::3, 0::3]).all()


def test_grid_is_by_default_at_least_as_wide_as_high() -> None:
    assert grid(flat([1] * 64)).size == (8 * 86 + 2, 8 * 86 + 2)
    assert grid(flat([1] * 5)).size == (3 * 86 + 2, 2 * 86 + 2)


def test_reconstructions_stand_directly_below_their_inputs() -> None:
    picture = np.asarray(side_by_side(flat([1, 2, 3]), flat([101, 102, 103]), columns=2))
    column = picture[:, 44]
    order = [level for level in dict.fromkeys(column.tolist()) if level != picture[0, 0]]
    assert order == [1, 101, 3, 103]
    starts = {level: int(np.argmax(column == level)) for level in order}
    within, between = starts[101] - starts[1] - 84, starts[3] - starts[101] - 84
    assert 0 < within < between


def test_side_by_side_refuses_different_shapes() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        side_by_side(flat([1, 2]), flat([1]))


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (1, 0, 8, 8), (1, 8, 8)])
def test_grid_refuses_what_is_no_picture(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"N, C, H, W"):
        grid(torch.zeros(shape))


def test_single_keeps_the_size(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    path = save_png(single(image), tmp_path / "deep" / "one.png")
    assert (np.asarray(Image.open(path)) == image.permute(1, 2, 0).numpy()).all()


def test_a_failed_write_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_png(grid(flat([7])), tmp_path / "a.png")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(grid(flat([9])), path)
    assert path.read_bytes() == before


def test_two_channels_are_magenta_and_green_and_of_many_the_first_three_are_shown() -> None:
    levels = torch.tensor([10, 200, 30, 40], dtype=torch.uint8).view(1, 4, 1, 1)
    images = levels.expand(1, 4, 50, 50)
    assert np.asarray(single(images[0, :2]))[0, 0].tolist() == [10, 200, 10]
    assert np.asarray(grid(images))[10, 10].tolist() == [10, 200, 30]


def test_16_bit_levels_go_to_the_nearest_of_8_bits() -> None:
    levels = torch.tensor([0, 128, 129, 257, 65535 - 129, 65535]).to(torch.uint16)
    assert to_uint8(levels).tolist() == [0, 0, 1, 1, 254, 255]


def test_images_of_several_sizes_stand_in_the_middle_of_their_cells() -> None:
    images = [flat([10], size=60)[0], flat([20])[0, :, :20, :]]
    picture = np.asarray(grid(images))
    assert picture.shape == (64, 2 * 62 + 2)
    assert (picture[2:62, 2:62] == 10).all()
    second = picture[2:62, 64:124]
    assert (second[20:40, 16:44] == 20).all() and (second == 20).sum() == 20 * 28
    both = side_by_side(images, images)
    assert both.size[0] == 126
    with pytest.raises(ValueError, match="differ in shape"):
        side_by_side(images, images[::-1])


def test_pictures_by_name_and_step(tmp_path: Path) -> None:
    for name in ("by_class_00000020", "by_class_00000010", "other", "samples_00000010"):
        (tmp_path / f"{name}.png").touch()
    found = find_images(tmp_path)
    assert {name: list(paths) for name, paths in found.items()} == {
        "by_class": [10, 20],
        "samples": [10],
    }


def test_captions_say_what_is_known() -> None:
    metrics = {"eval/neg_elbo_nats": 94.12, "eval/bits_per_dim": 0.1732}
    assert image_caption(1500, metrics) == "step 1500 | 94.12 nats | 0.1732 bits/dim"
    assert image_caption(3, {"eval/bits_per_dim": None}) == "step 3"


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
    writer = ImageWriter(tmp_path, [heard], say=print)
    for step in (10, 20):
        writer.put(step, "samples", f"step {step}", draw())
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
    writer = ImageWriter(tmp_path / "file", [heard], say=said.append)
    writer.put(10, "samples", "", draw())
    writer.close()
    assert len(said) == 1 and "samples of step 10 is not written" in said[0]
    assert heard.pictures == []


def test_a_slow_disk_never_blocks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(images, "_QUEUED_IMAGES", 1)
    go_on = threading.Event()
    said: list[str] = []

    save = images.save_png

    def slowly(image: Image.Image, path: Path) -> Path:
        go_on.wait(10)
        return save(image, path)

    monkeypatch.setattr(images, "save_png", slowly)
    writer = ImageWriter(tmp_path, [], say=said.append)
    for step in range(5):
        writer.put(step, "samples", "", draw())
    assert len(said) >= 3 and "the disk is too slow" in said[0]
    go_on.set()
    writer.close()
