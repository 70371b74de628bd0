"""One picture on its way into a shard; that the trainer reads it is tested in `tests/data`."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from tests.support.picture_sources import decoded, encoded, jpeg_with, npy
from vae_dist.config.commands import PackCommand
from vae_dist.data.decode import decode_own
from vae_dist.data.tar import DamagedSampleError
from vae_dist.packing.picture import KEPT, _resized, prepare

COLOUR = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREY, PLANES = COLOUR[:, :, 0], COLOUR.transpose(2, 0, 1)
SMOOTH = np.add.outer(np.arange(64), 2 * np.arange(96)).astype(np.uint8)
JPEG = encoded(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8)), "JPEG")
WIDE = encoded(GREY.astype(np.uint16) * 255)
CLEAR = encoded(np.zeros((4, 4, 4), np.uint8))
MASK = np.pad(np.zeros((3, 4), np.uint8), ((5, 4), (9, 7)), constant_values=255)


def test_what_needs_no_change_is_kept_byte_for_byte():
    for suffix, data, channels in (
        ("png", encoded(COLOUR), 3),
        ("jpg", encoded(GREY, "JPEG"), 1),
        ("webp", encoded(COLOUR, "WEBP"), 3),
        ("png", encoded(Image.fromarray(COLOUR).convert("RGBA")), 4),
        ("npy", npy(PLANES[:2].astype(np.uint16) * 255), 2),
        ("npy", npy(PLANES.astype(np.float32) / 255), 3),
        ("npy", npy(np.where(GREY > 99, np.nan, 0.0).astype(np.float32)), 1),  # missing
        ("png", WIDE, 1),
    ):
        picture = prepare(data, PackCommand())
        assert picture == (suffix, data, (channels, 12, 20), (KEPT,), None)


def test_formats_and_background():
    lossless = prepare(encoded(COLOUR, "BMP"), PackCommand())
    assert lossless.suffix == "png" and (decoded(lossless.data) == COLOUR).all()
    assert prepare(encoded(COLOUR), PackCommand(format="jpg")).suffix == "jpg"
    white = prepare(CLEAR, PackCommand(background="white"))
    assert (decoded(white.data) == 255).all() and white.shape == (3, 4, 4)
    assert prepare(CLEAR, PackCommand(size=2)).shape == (4, 2, 2)


def test_what_cannot_be_packed_is_refused():
    for data, mask, keys, reason in (
        (b"no picture", None, {}, "no readable picture"),
        (encoded(np.zeros((400, 300), np.uint8)), None, {}, "more than data.max_pixels=100000"),
        (npy(np.array([print], object)), None, {}, "object"),
        (b"\xff\x0a", None, {}, "which is not decoded; convert it to"),
        (encoded(COLOUR)[:-30], None, {}, "PNG"),
        (b"P5 2 2 65535 " + bytes(8), None, {}, "more than 8 bits a channel"),
        (CLEAR, None, {"format": "jpg"}, "set background=white"),
        (WIDE, None, {"size": 8}, "16-bit PNG is kept as it is; leave size"),
        (encoded(COLOUR), encoded(MASK.T), {}, "its mask is 20 x 12 pixels, but the image 12 x 20"),
        (encoded(COLOUR), b"no picture", {"size": 6}, "its .mask.png: no readable PNG"),
        (encoded(COLOUR), b"", {}, "its .mask.png: an empty file"),
    ):
        with pytest.raises(DamagedSampleError, match=reason):
            prepare(data, PackCommand(max_pixels=10**5, **keys), mask=mask)
    for data in (JPEG[: len(JPEG) // 2] + b"\xff\xd9", JPEG[:2000] + bytes(512) + JPEG[2512:]):
        for keys in ({}, {"size": 8}, {"format": "png"}):  # whatever is asked for
            with pytest.raises(DamagedSampleError, match="JPEG"):
                prepare(data, PackCommand(**keys))


def test_colours_become_those_of_srgb_and_animations_their_first_frame():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert prepare(encoded(COLOUR, icc_profile=srgb), PackCommand()).notes == (KEPT,)
    swapped = srgb.replace("sRGB".encode("utf-16-be"), "rgbS".encode("utf-16-be"))
    swapped = swapped.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")
    changed = prepare(encoded(COLOUR, icc_profile=swapped), PackCommand())
    assert changed.notes == ("converted to sRGB",)
    assert "icc_profile" not in Image.open(io.BytesIO(changed.data)).info
    assert abs(decoded(changed.data).astype(int) - COLOUR[:, :, ::-1]).max() < 8
    first, *others = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        data = encoded(first, kind, save_all=True, append_images=others, lossless=True)
        picture = prepare(data, PackCommand(format="png"))
        assert "first frame" in picture.notes[0]
        assert (decoded(picture.data)[0, 0] == [255, 0, 0]).all()


@pytest.mark.parametrize("side", [256, 257, 519])
def test_a_jpeg_that_is_made_small_is_the_full_one_made_small(side):
    """An eighth only where that divides the sides: else the edges are stretched. 40 dB. And never
    with a mask: blocks of 8 pixels would leak."""
    noise = np.random.default_rng(4).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
    data, command = encoded(picture, "JPEG", quality=95), PackCommand(size=32, format="png")
    small = decoded(prepare(data, command).data).astype(float)
    full = np.asarray(Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.square(small - full).mean() < 255**2 / 1e4
    mask = encoded(np.full((side, side), 255, np.uint8))
    np.testing.assert_array_equal(decoded(prepare(data, command, mask=mask).data), full)


@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_and_masks_are_turned_as_the_trainer_turns_them(turn):
    for kind, xmp in ((1, 3), (3, 3), (4, 0), (3, 0)):
        data = jpeg_with(SMOOTH, kind, turn, xmp)
        (own,) = decode_own("jpg", data, max_pixels=10**6)
        mask = np.full(own.shape, 255, np.uint8)
        mask[:32] = 0
        assert prepare(data, PackCommand()).shape == (1, *own.shape)
        remade = prepare(data, PackCommand(format="png"), mask=encoded(mask))
        assert decoded(remade.data).shape == own.shape and remade.mask == encoded(mask)
        assert np.abs(decoded(remade.data).astype(int) - own).mean() < 1
        small = decoded(prepare(data, PackCommand(size=32), mask=encoded(mask)).mask)
        assert not small[:16].any() and small[18:].all()


@pytest.mark.parametrize(
    "size", [0, 6, 7, 12, 99, [12, 20], [8, 8], [5, 16], [12, 13], [24, 20], [9, 31]]
)
def test_sizes_and_crops_are_those_of_pillow_and_no_missing_pixel_leaks(size):
    image, side = Image.fromarray(COLOUR), 12
    if isinstance(size, list):
        want = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
    else:
        side = min(size or side, side)
        want = image.resize((round(20 * side / 12), side), Image.Resampling.BICUBIC)
    picture = prepare(encoded(COLOUR), PackCommand(size=size), mask=encoded(MASK))
    np.testing.assert_array_equal(decoded(picture.data), np.asarray(want))
    assert picture.shape == (3, want.height, want.width)
    if want.size == image.size:
        assert picture.notes == (KEPT,) and picture.mask == encoded(MASK)
        return
    observed, touched = decoded(picture.mask), np.zeros(picture.shape[1:], bool)
    for row, column in np.argwhere(MASK == 0):
        impulse = np.zeros(MASK.shape, np.float32)
        impulse[row, column] = 1
        touched |= np.asarray(_resized(Image.fromarray(impulse), size)) != 0
    assert set(np.unique(observed)) == {0, 255} and observed.shape == touched.shape
    assert not (observed[touched] == 255).any()
    assert (observed == 0).sum() <= touched.sum() + 2 * sum(touched.shape)  # zeros of the filter
