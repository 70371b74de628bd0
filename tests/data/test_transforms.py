"""Size, crop and mirror; masks, drawn or from the sample, that follow their image; labels."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import (
    DRAWN,
    ImageSettings,
    UnknownClassError,
    draw_mask,
    label_of,
    resized_mask,
    transform,
)

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


def drawn(kind: str, *, fraction: float = 0.5, sample: int = 0, epoch: int = 0) -> np.ndarray:
    return draw_mask(kind, (28, 20), fraction, seed=3, epoch=epoch, sample=sample)


@pytest.mark.parametrize("kind", DRAWN)
def test_a_drawn_mask_belongs_to_seed_epoch_and_sample(kind: str) -> None:
    again = draw_mask(kind, (28, 20), 0.5, seed=3, epoch=0, sample=0)
    assert again.dtype == np.uint8 and again.shape == (1, 28, 20)
    assert (again == drawn(kind)).all()
    others = [drawn(kind, sample=s, epoch=e) for s in range(4) for e in range(4)]
    assert len({mask.tobytes() for mask in others}) >= 4
    assert {0, 1} == set(np.unique(again))


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["random", "rectangle"])
def test_the_fraction_is_that_of_missing_pixels(kind: str, fraction: float) -> None:
    missing = [1 - drawn(kind, fraction=fraction, sample=s).mean() for s in range(200)]
    assert np.mean(missing) == pytest.approx(fraction, abs=0.015)
    if kind == "rectangle":
        assert max(abs(m - fraction) for m in missing) < 0.06


def test_halves_are_the_four_sides() -> None:
    found = {drawn("half", sample=s).tobytes() for s in range(60)}
    assert len(found) == 4
    assert all(drawn("half", sample=s).mean() == 0.5 for s in range(60))


def test_rectangles_lie_anywhere() -> None:
    seen = sum(1 - drawn("rectangle", fraction=0.2, sample=s).astype(float) for s in range(400))
    assert (seen > 0).mean() > 0.99


@settings(max_examples=60, deadline=None)
@given(
    have=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    # torch 2.13 gives all rows of an image of one column the values of the first
    want=st.tuples(st.integers(1, 24), st.integers(2, 24)),
    seed=st.integers(0, 1000),
)
def test_what_counts_after_resizing_holds_nothing_of_missing_pixels(
    have: tuple[int, int], want: tuple[int, int], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    mask = np.ones((1, *have), np.uint8)
    for _ in range(generator.integers(1, 4)):
        mask[0, generator.integers(have[0]), generator.integers(have[1])] = 0
    image = torch.from_numpy(generator.random((1, 1, *have)))
    other = torch.where(torch.from_numpy(mask)[None] > 0, image, 1000.0)
    one, two = (
        interpolate(x, want, mode="bicubic", antialias=True)[0].numpy() for x in (image, other)
    )
    target = resized_mask(mask, want)
    assert target.shape == (1, *want)
    observed = target > 0
    assert np.allclose(one[observed], two[observed], rtol=0, atol=1e-9)


def test_no_pixel_is_lost_without_need() -> None:
    """Far from the hole every pixel is observed, and without a hole all are."""
    mask = np.ones((1, 40, 40), np.uint8)
    assert resized_mask(mask, (13, 9)).all()
    mask[0, :8, :8] = 0
    target = resized_mask(mask, (20, 20))
    assert not target[0, :4, :4].any() and target[0, 6:, :].all() and target[0, :, 6:].all()


@pytest.mark.parametrize(("text", "label"), [(b"7", 7), (b" 12\n", 12), (b"-1", -1), (None, -1)])
def test_the_cls_member(text: bytes | None, label: int) -> None:
    assert label_of({} if text is None else {"cls": text}) == label
    assert label_of({} if text is None else {"cls": text}, num_classes=13) == label


RECORD: dict[str, Any] = {
    "class": 3,
    "attributes": {"Smiling": -1, "Young": 1, "Male": True, "Bald": None},
    "name": "x",
}


@pytest.mark.parametrize(
    ("key", "num_classes", "label"),
    [
        ("class", 0, 3),
        ("class", 4, 3),
        ("attributes.Smiling", 2, 0),  # the marks -1 and 1 of an attribute list
        ("attributes.Young", 2, 1),
        ("attributes.Male", 2, 1),
        ("attributes.Bald", 2, -1),
        ("attributes.Hat", 2, -1),
        ("class.deeper", 2, -1),
    ],
)
def test_a_field_of_the_json_member(key: str, num_classes: int, label: int) -> None:
    sample = {"json": json.dumps(RECORD).encode(), "cls": b"9"}
    assert label_of(sample, key=key, num_classes=num_classes) == label
    assert label_of({"cls": b"9"}, key=key, num_classes=num_classes) == -1


@pytest.mark.parametrize(
    ("sample", "key", "reason"),
    [
        ({"cls": b"cat"}, "cls", ".cls is no integer: b'cat'"),
        ({"cls": b"99999999999999999999999"}, "cls", "64 bits"),
        ({"json": b"{"}, "class", ".json is no JSON"),
        ({"json": b"[" * 100_000}, "class", ".json is no JSON"),
        ({"json": b'{"class": 1.5}'}, "class", "field class is no integer of 64 bits: '1.5'"),
    ],
)
def test_what_is_no_label_is_damage(sample: dict[str, bytes], key: str, reason: str) -> None:
    with pytest.raises(DamagedSampleError, match=reason):
        label_of(sample, key=key)


@pytest.mark.parametrize(("value", "key"), [(10, "cls"), (-2, "cls"), (10, "class"), (-1, "class")])
def test_a_label_that_no_class_has(value: int, key: str) -> None:
    sample = {"cls": str(value).encode(), "json": json.dumps({"class": value}).encode()}
    with pytest.raises(UnknownClassError, match=f"its label {value}.*none of the classes 0 to 9"):
        label_of(sample, key=key, num_classes=10)
