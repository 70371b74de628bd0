from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import ImageSettings, transform

PHOTO = np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8)


def run(image: np.ndarray, settings: ImageSettings, sample: int = 0, epoch: int = 0) -> np.ndarray:
    return transform(image, settings, seed=1, epoch=epoch, sample=sample)


def test_native_images_are_left_alone() -> None:
    settings = ImageSettings(3, (40, 60), False, 10**6, crop="random")
    assert run(PHOTO, settings) is PHOTO


@pytest.mark.parametrize("size", [(20, 20), (40, 20), (13, 31), (50, 50), (40, 60)])
@pytest.mark.parametrize("channels", [1, 3])
def test_center_crop_of_the_covering_size_is_that_of_pillow(
    size: tuple[int, int], channels: int
) -> None:
    image = PHOTO[:channels]
    scale = max(size[0] / 40, size[1] / 60)
    height, width = round(40 * scale), round(60 * scale)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    resized = [
        np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC))
        for c in image
    ]
    want = np.stack(resized)[:, top : top + size[0], left : left + size[1]]
    got = run(image, ImageSettings(channels, size, True, 10**6))
    assert got.shape == (channels, *size) and got.dtype == np.uint8
    assert np.abs(got.astype(int) - want).max() <= 2


def test_random_crops_reach_every_place_and_depend_on_epoch_and_sample_alone() -> None:
    settings = ImageSettings(3, (40, 57), True, 10**6, crop="random")
    places = {
        next(x for x in range(4) if (run(PHOTO, settings, s) == PHOTO[:, :, x : x + 57]).all())
        for s in range(40)
    }
    assert places == {0, 1, 2, 3}
    assert (run(PHOTO, settings, 5) == run(PHOTO, settings, 5)).all()
    by_epoch = [run(PHOTO, settings, 5, epoch=e).tobytes() for e in range(20)]
    assert len(set(by_epoch)) > 1


def test_flips_mirror_left_and_right_half_the_time() -> None:
    settings = ImageSettings(3, (40, 60), False, 10**6, flip=True)
    flipped = 0
    for sample in range(200):
        got = run(PHOTO, settings, sample)
        is_flipped = bool((got == PHOTO[:, :, ::-1]).all())
        assert is_flipped or (got == PHOTO).all()
        flipped += is_flipped
    assert 70 < flipped < 130


def test_evaluation_draws_nothing() -> None:
    settings = ImageSettings(3, (30, 30), True, 10**6, crop="random", flip=True)
    quiet = settings.without_augmentation()
    images = {run(PHOTO, quiet, sample).tobytes() for sample in range(10)}
    assert images == {run(PHOTO, ImageSettings(3, (30, 30), True, 10**6)).tobytes()}


def test_an_image_that_would_grow_beyond_the_limit_is_damage() -> None:
    settings = ImageSettings(channels=1, size=(64, 64), resize=True, max_pixels=2**20)
    line = np.zeros((1, 1, 400_000), np.uint8)
    with pytest.raises(DamagedSampleError, match="before the crop"):
        transform(line, settings, seed=0, epoch=0, sample=0)
