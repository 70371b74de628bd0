from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from tests.support.picture_sources import encoded, jpeg_with, npy
from vae_dist.config.commands import PackCommand
from vae_dist.data.decode import decode_own
from vae_dist.data.tar import DamagedSampleError
from vae_dist.packing.picture import _resized, _target, prepare, thumbnail

COLOUR = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREY, PLANES = COLOUR[:, :, 0], COLOUR.transpose(2, 0, 1)
UPRIGHT = Image.Exif()
UPRIGHT[0x0112] = 6
SMOOTH = np.add.outer(np.arange(64), 2 * np.arange(96)).astype(np.uint8)
JPEG = encoded(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8)), "JPEG")


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("suffix", "data", "channels"),
    [
        ("png", encoded(COLOUR), 3),
        ("jpg", encoded(COLOUR, "JPEG"), 3),
        ("jpg", encoded(GREY, "JPEG"), 1),
        ("webp", encoded(COLOUR, "WEBP"), 3),
        ("png", encoded(Image.fromarray(COLOUR).convert("P")), 3),
        ("png", encoded(Image.fromarray(COLOUR).convert("RGBA")), 4),
        ("npy", npy(PLANES), 3),
        ("npy", npy(PLANES[:2].astype(np.uint16) * 255), 2),
        ("npy", npy(PLANES.astype(np.float32) / 255), 3),
        ("png", encoded(Image.fromarray(GREY.astype(np.uint16) * 255)), 1),
    ],
)
def test_what_needs_no_change_is_kept_byte_for_byte(
    suffix: str, data: bytes, channels: int
) -> None:
    for called in (suffix, "bmp"):  # a suffix that lies is put right
        picture = prepare(called, data, PackCommand())
        assert picture == (suffix, data, (channels, 12, 20), True, None, "")


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (6, (3, 6, 10)),
        (12, (3, 12, 20)),
        (99, (3, 12, 20)),
        ([8, 8], (3, 8, 8)),
        ([24, 20], (3, 24, 20)),
    ],
)
def test_sizes_and_crops_are_those_of_pillow(size: Any, shape: tuple[int, int, int]) -> None:
    picture = prepare("png", encoded(COLOUR), PackCommand(size=size))
    assert picture.shape == shape and picture.kept == (shape == (3, 12, 20))
    image, (width, height) = Image.fromarray(COLOUR), shape[:0:-1]
    assert _target(12, 20, size) == (height, width)
    want = image.resize((width, height), Image.Resampling.BICUBIC)
    if isinstance(size, list):
        want = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(decoded(picture.data), np.asarray(want))


def test_formats_orientation_and_background() -> None:
    lossless = prepare("bmp", encoded(COLOUR, "BMP"), PackCommand())
    assert lossless.suffix == "png"
    np.testing.assert_array_equal(decoded(lossless.data), COLOUR)
    assert prepare("png", encoded(COLOUR), PackCommand(format="jpg")).suffix == "jpg"
    turned = encoded(COLOUR, "JPEG", exif=UPRIGHT)
    assert prepare("jpg", turned, PackCommand()).shape == (3, 20, 12)
    small = prepare("jpg", turned, PackCommand(size=6))
    assert small.shape == (3, 10, 6) and decoded(small.data).shape == (10, 6, 3)
    clear = encoded(np.zeros((4, 4, 4), np.uint8))
    white = prepare("png", clear, PackCommand(background="white"))
    assert (decoded(white.data) == 255).all() and white.shape == (3, 4, 4)
    assert prepare("png", clear, PackCommand()).shape == (4, 4, 4)
    with pytest.raises(DamagedSampleError, match="set background=white"):
        prepare("png", clear, PackCommand(format="jpg"))


@pytest.mark.parametrize(
    ("suffix", "data", "reason"),
    [
        ("png", b"", "an empty file"),
        ("png", b"no picture", "no readable PNG"),
        ("jpg", b"<!DOCTYPE html>", "a web page, no image"),
        ("jpg", encoded(COLOUR, "JPEG")[:300], "JPEG"),
        ("png", encoded(COLOUR)[:-30], "PNG"),
        ("png", encoded(np.zeros((40, 30), np.uint8)), "more than data.max_pixels=1000"),
        ("npy", npy(np.array([print], object)), "object"),
        ("npy", npy(COLOUR)[:-1], "cut off"),
        ("npy", npy(COLOUR.astype(np.float32)), "float images lie in"),
        ("npy", npy(COLOUR.astype(np.int32)), "int32"),
        ("heic", b"\0\0\0\x1cftypheic", "which is not decoded; convert it to"),
        ("jxl", b"\xff\x0a", "which is not decoded; convert it to"),
    ],
)
def test_what_cannot_be_read_is_refused(suffix: str, data: bytes, reason: str) -> None:
    with pytest.raises(DamagedSampleError, match=reason):
        prepare(suffix, data, PackCommand(max_pixels=1000))


def test_what_is_damaged_does_not_depend_on_what_is_asked_for() -> None:
    hole = JPEG[:2000] + bytes(512) + JPEG[2512:]
    for data in (JPEG[: len(JPEG) // 2] + b"\xff\xd9", hole):
        for command in (PackCommand(), PackCommand(size=8), PackCommand(format="png")):
            with pytest.raises(DamagedSampleError):
                prepare("jpg", data, command)


def test_wide_levels_are_not_resized_and_have_thumbnails() -> None:
    levels = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    data = encoded(Image.fromarray(levels))
    with pytest.raises(DamagedSampleError, match="16-bit PNG is kept as it is; leave size"):
        prepare("png", data, PackCommand(size=8))
    sheet = thumbnail("png", data, 8)
    assert sheet.shape == (8, 8, 3) and sheet[0].mean() < 40 and sheet[-1].mean() > 215
    pixels = np.linspace(-1, 1, 240, dtype=np.float32).reshape(12, 20)
    pixels[:6] = np.nan  # missing: kept, and drawn black
    assert prepare("npy", npy(pixels), PackCommand()).data == npy(pixels)
    sheet = thumbnail("npy", npy(pixels), 8)
    assert (sheet[:3] == 0).all() and sheet[-1].mean() > 215
    assert (thumbnail("npy", npy(np.full_like(pixels, np.nan)), 8) == 128).all()


def test_colours_of_another_profile_become_those_of_srgb() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kept = prepare("png", encoded(COLOUR, icc_profile=srgb), PackCommand())
    assert kept.kept and not kept.note
    swapped = srgb.replace("sRGB".encode("utf-16-be"), "rgbS".encode("utf-16-be"))
    swapped = swapped.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")
    changed = prepare("png", encoded(COLOUR, icc_profile=swapped), PackCommand())
    assert not changed.kept and "converted to sRGB" in changed.note
    assert "icc_profile" not in Image.open(io.BytesIO(changed.data)).info
    assert abs(decoded(changed.data).astype(int) - COLOUR[:, :, ::-1]).max() < 8


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_animated_files_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    picture = prepare(kind.lower(), data, PackCommand(format="png"))
    assert "first frame" in picture.note and (decoded(picture.data)[0, 0] == [255, 0, 0]).all()


# masks

MASK = np.pad(np.zeros((3, 4), np.uint8), ((5, 4), (9, 7)), constant_values=255)


@pytest.mark.parametrize("size", [0, 12, [12, 20]])
def test_the_mask_of_a_picture_that_keeps_its_size_is_kept_byte_for_byte(size: Any) -> None:
    command = PackCommand(size=size, format="webp")
    picture = prepare("png", encoded(COLOUR), command, mask=encoded(MASK))
    assert not picture.kept and picture.mask == encoded(MASK)


@pytest.mark.parametrize("size", [7, [8, 8], [5, 16], [12, 13], [24, 20], [9, 31]])
def test_no_missing_pixel_leaks_through_resizing_and_crop(size: Any) -> None:
    picture = prepare("png", encoded(COLOUR), PackCommand(size=size), mask=encoded(MASK))
    assert picture.mask is not None
    observed = decoded(picture.mask)
    touched = np.zeros(picture.shape[1:], bool)
    for row, column in np.argwhere(MASK == 0):
        impulse = np.zeros(MASK.shape, np.float32)
        impulse[row, column] = 1
        touched |= np.asarray(_resized(Image.fromarray(impulse), size)) != 0
    assert set(np.unique(observed)) == {0, 255} and observed.shape == touched.shape
    assert not (observed[touched] == 255).any()
    assert (observed == 0).sum() <= touched.sum() + 2 * sum(touched.shape)  # zeros of the filter


def test_a_jpeg_with_a_mask_is_upright_and_decoded_in_full_before_it_is_resized() -> None:
    """At a quarter of its size, as the decoder offers, blocks of 8 pixels would leak."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    data, mask = encoded(pixels, "JPEG"), encoded(np.full((64, 64), 255, np.uint8))
    picture = prepare("jpg", data, PackCommand(size=8, format="png"), mask=mask)
    want = Image.open(io.BytesIO(data)).resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(decoded(picture.data), np.asarray(want))
    shades = np.repeat(np.array([0, 255], np.uint8), 10)[:, None].repeat(12, 1)
    data = encoded(COLOUR, "JPEG", exif=UPRIGHT)
    picture = prepare("jpg", data, PackCommand(size=6), mask=encoded(shades))
    assert picture.mask is not None and picture.shape == (3, 10, 6)
    assert (decoded(picture.mask)[:5] == 0).all() and (decoded(picture.mask)[7:] == 255).all()


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (encoded(MASK.T), "its mask is 20 x 12 pixels, but the image 12 x 20"),
        (b"no picture", "its .mask.png: no readable PNG"),
        (b"", "its .mask.png: an empty file"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: bytes, reason: str) -> None:
    for command in (PackCommand(), PackCommand(size=6)):
        with pytest.raises(DamagedSampleError, match=reason):
            prepare("png", encoded(COLOUR), command, mask=mask)


@pytest.mark.parametrize("side", [256, 257, 519])
def test_a_jpeg_that_is_made_small_is_the_full_one_made_small(side: int) -> None:
    """An eighth only where that divides the sides: else the edges are stretched. 40 dB."""
    noise = np.random.default_rng(4).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
    data = encoded(picture, "JPEG", quality=95)
    small = decoded(prepare("jpg", data, PackCommand(size=32, format="png")).data).astype(float)
    full = Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.square(small - np.asarray(full)).mean() < 255**2 / 1e4


@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_turned_as_the_trainer_turns_them(turn: int) -> None:
    for kind, xmp in ((1, 3), (3, 3), (4, 0), (3, 0)):
        data = jpeg_with(SMOOTH, kind, turn, xmp)
        remade = decoded(prepare("jpg", data, PackCommand(format="png")).data)
        (own,) = decode_own("jpg", data, max_pixels=10**6)
        assert remade.shape == own.shape == prepare("jpg", data, PackCommand()).shape[1:]
        assert np.abs(remade.astype(int) - own).mean() < 1
