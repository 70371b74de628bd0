"""From the bytes of a file to pixels: what is exact, what is converted, what is refused and why."""

import io
import zlib
from itertools import product

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image, ImageOps

from tests.support.picture_sources import encoded, jpeg_with, npy, tiff
from vae_dist.data.decode import decode_sample, size_of_sample
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import ImageSettings, fit

GREY = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (5, 7, 4), dtype=np.uint16)
SMOOTH = np.add.outer(np.arange(64), 2 * np.arange(96)).astype(np.uint8)
CLEAR = Image.fromarray(np.dstack([COLOUR, GREY % 250]))  # no pixel is opaque
PLANES = COLOUR.transpose(2, 0, 1)


def decode(data, suffix="png", **asked):
    return decode_sample({suffix: data}, **{"channels": 1, "max_pixels": 10_000, **asked})


def with_header(png, *, height, interlaced=0):
    """A PNG whose header says something else than its pixels."""
    header = png[12:23] + bytes([height, *png[24:28], interlaced])
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def files_of(kind, array):
    """All ways to write (H, W, C) without loss."""
    planes, squeezed = array.transpose(2, 0, 1), array[:, :, 0] if array.shape[2] == 1 else array
    if kind == "npy":
        return [npy(planes), npy(np.asfortranarray(planes))] + [npy(planes[0])] * (len(planes) == 1)
    if kind == "webp":
        return [encoded(array, "WEBP", lossless=True, exact=True)]
    if kind == "png":
        found = [imagecodecs.png_encode(array)]  # Pillow has no 16-bit colour
        return [*found, encoded(squeezed)] if array.itemsize == 1 else found
    if len(planes) in (1, 3):
        return [tiff(squeezed, photometric="rgb" if len(planes) == 3 else "minisblack")]
    options = {"photometric": "minisblack"}
    return [tiff(planes, planarconfig="separate", **options), tiff(planes, **options)]


@pytest.mark.parametrize("kind", ["png", "webp", "npy", "tif"])
def test_lossless_files_are_read_exactly(kind):
    """Whatever their suffix says, and of the size that is known after their header."""
    widths = {"png": (1, 2, 3, 4), "webp": (3, 4)}.get(kind, (1, 2, 3, 5))
    types = {"png": ["u1", "u2"], "webp": ["u1"]}.get(kind, ["u1", "u2", ">u2", "f4"])
    for channels, dtype, size in product(widths, map(np.dtype, types), [(5, 7), (13, 16)]):
        levels = np.random.default_rng(channels).integers(0, 2**16, (*size, channels))
        array = (levels >> 16 - 8 * min(2, dtype.itemsize)).astype(dtype)
        array = (levels / 2**15 - 1).astype(dtype) if dtype.kind == "f" else array
        for data in files_of(kind, array):
            got = decode(data, "jpg", channels=channels, bits=8 * dtype.itemsize)
            assert got.dtype == dtype.newbyteorder("=") and got.dtype.isnative
            np.testing.assert_array_equal(got, array.transpose(2, 0, 1))
            assert size_of_sample({"jpg": data}, max_pixels=10**4) == size


def test_channels_become_what_is_asked():
    for data, bits in ((encoded(GREY), 8), (npy(GREY), 8), (encoded(DEEP[:, :, 0]), 16)):
        one, three = (decode(data, channels=channels, bits=bits) for channels in (1, 3))
        np.testing.assert_array_equal(three, np.repeat(one, 3, 0))
    np.testing.assert_allclose(decode(encoded(COLOUR))[0], COLOUR @ [0.299, 0.587, 0.114], atol=1)
    for mode in ("1", "P", "LA", "RGBA", "CMYK"):
        image, image_format = Image.fromarray(COLOUR), "JPEG" if mode == "CMYK" else "PNG"
        assert decode(encoded(image.convert(mode), image_format), channels=3).shape == (3, 5, 7)
    opaque = encoded(Image.fromarray(COLOUR).convert("RGBA"))
    np.testing.assert_array_equal(decode(opaque, channels=3), PLANES)


@pytest.mark.parametrize("background", ["white", "black"])
def test_transparent_pixels_lie_on_the_background(background):
    ground = Image.new("RGBA", CLEAR.size, background)
    expected = Image.alpha_composite(ground, CLEAR).convert("RGB")
    got = decode(encoded(CLEAR), channels=3, background=background).transpose(1, 2, 0)
    np.testing.assert_allclose(got, np.asarray(expected), atol=1)
    grey = decode(encoded(CLEAR), channels=1, background=background)
    np.testing.assert_array_equal(grey[0], np.asarray(Image.fromarray(got).convert("L")))
    assert decode(encoded(CLEAR), channels=4, background=background).shape == (4, 5, 7)
    deep = decode(imagecodecs.png_encode(DEEP), channels=3, bits=16, background=background)
    alpha = DEEP[:, :, 3:] / 65535
    wanted = DEEP[:, :, :3] * alpha + (1 - alpha) * 65535 * (background == "white")
    np.testing.assert_allclose(deep.transpose(1, 2, 0), wanted, atol=1)


def test_a_jpeg_that_is_made_small_may_be_decoded_at_a_part_of_its_size():
    """Which divides it, and leaves twice the pixels that are wanted: 40 dB."""
    noise = np.random.default_rng(4).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    settings = ImageSettings(3, (32, 32), True, 10**6)
    for size, decoded in (
        ((512, 768), (64, 96)),
        ((320, 640), (80, 160)),  # 1/8 would leave 40 rows
        ((640, 320), (160, 80)),
        ((257, 257), (257, 257)),  # no scale divides both
        ((514, 514), (257, 257)),
    ):
        picture = Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC)
        sample = {"jpg": encoded(picture, "JPEG", quality=95)}
        full = decode_sample(sample, settings)
        small = decode_sample(sample, settings, at_least=(32, 32))
        assert small.shape[1:] == decoded and full.shape[1:] == size
        by_pillow = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).transpose(2, 0, 1)
        np.testing.assert_allclose(full, by_pillow, atol=2)
        small, full = (fit(x, settings, (32, 32), None) for x in (small, full))
        assert np.square(small.astype(float) - full).mean() < 255**2 / 1e4


def test_damaged_pixels_of_a_jpeg_are_refused():
    """Every other kind of damage that libjpeg only warns of: Pillow would show what it made up."""
    image = np.add.outer(3 * np.arange(32), np.arange(48)).astype(np.uint8)
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}):
        whole = encoded(image, "JPEG", **options)
        for at in range(whole.index(b"\xff\xda") + 12, len(whole) - 2, 5):
            data = whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :]
            try:
                simplejpeg.decode_jpeg(data, "GRAY")
            except ValueError as error:
                if "before marker 0xd9" not in str(error):
                    with pytest.raises(DamagedSampleError, match="JPEG"):
                        decode(data, "jpg")
        for data in (whole[:-40], whole[:-2]):
            with pytest.raises(DamagedSampleError, match=r"Premature end|truncated"):
                decode(data, "jpg")
    cmyk = encoded(Image.fromarray(image).convert("CMYK"), "JPEG")
    for at in (-60, -40):  # which Pillow reads without a word
        data = cmyk[:at] + b"\xff\xd9"
        Image.open(io.BytesIO(data)).load()
        with pytest.raises(DamagedSampleError, match="damaged JPEG"):
            decode(data, "jpg", channels=3)


def test_a_jpeg_with_harmless_warnings_is_read():
    whole = encoded(SMOOTH, "JPEG")
    tables, scan = whole.index(b"\xff\xc4"), whole.index(b"\xff\xda")
    for data in (
        whole[:tables] + b"abc" + whole[tables:],  # between segments
        whole[:-2] + bytes(20) + whole[-2:],  # behind the pixels
        whole[: scan + 8] + b"\x3e" + whole[scan + 9 :],  # odd parameters
        whole[:11] + b"\x09" + whole[12:],  # JFIF revision
    ):
        with pytest.raises(ValueError):
            simplejpeg.decode_jpeg(data, "GRAY")
        assert (decode(data, "jpg") == decode(whole, "jpg")).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_touched_byte_of_a_png_is_refused(bits):
    """Also the last ones of the pixels, which Pillow does not compare with their checksum."""
    whole = encoded(SMOOTH[:12, :12].astype(f"u{bits // 8}"))
    right = decode(whole, bits=bits)
    for at in range(len(whole)):
        data = whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :]
        with pytest.raises(DamagedSampleError):
            decode(data, bits=bits)
    assert (decode(whole[:-12], bits=bits) == right).all()  # no end mark
    with pytest.raises(DamagedSampleError, match="cut off"):
        decode(whole[:-13], bits=bits)


@pytest.mark.parametrize("turn", range(1, 9))
def test_images_are_turned_upright_whatever_says_so(turn):
    """EXIF of any type, else XMP, or the tag of a TIFF; sizes are those of upright images."""
    exif = Image.Exif()
    exif[0x0112] = turn
    files = [("jpg", jpeg_with(SMOOTH, kind, turn, xmp=3)) for kind in (1, 2, 3, 4)]
    files += [("jpg", jpeg_with(SMOOTH, 3, 0, xmp=turn))]
    files += [(f.lower(), encoded(SMOOTH, f, exif=exif)) for f in ("JPEG", "PNG", "WEBP")]
    files += [("tif", tiff(SMOOTH, extratags=[(274, "H", 1, turn, True)]))]
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(files[-3][1]))))
    for number, (suffix, data) in enumerate(files):
        got = decode(data, suffix)
        assert np.abs(got[0].astype(int) - upright).mean() < 2, (number, suffix)
        assert size_of_sample({suffix: data}, max_pixels=10**4) == got.shape[1:]


def test_what_the_values_of_a_tiff_mean():
    for source in (GREY, GREY.astype(np.uint16)):
        inverted = np.iinfo(source.dtype).max - source
        got = decode(tiff(inverted, photometric="miniswhite"), "tif", bits=8 * source.itemsize)
        np.testing.assert_array_equal(got[0], source)
    for bits in (1, 2, 4):
        shades = np.arange(64, dtype=np.uint8).reshape(8, 8) % (1 << bits)
        got = decode(tiff(shades, bitspersample=bits, photometric="minisblack"), "tif")
        np.testing.assert_array_equal(got[0], shades * (255 // ((1 << bits) - 1)))
    by_jpeg = tiff(np.full((16, 16, 3), (200, 30, 60), np.uint8), compression="jpeg")
    np.testing.assert_allclose(decode(by_jpeg, "tif", channels=3)[:, 0, 0], (200, 30, 60), atol=2)


def endless(tiff):
    """Its page is followed by itself."""
    at = int.from_bytes(tiff[4:8], "little")
    at += 2 + 12 * int.from_bytes(tiff[at : at + 2], "little")
    return tiff[:at] + tiff[4:8] + tiff[at + 4 :]


OWN = {"channels": 0, "bits": 0}
TINY = encoded(np.zeros((4, 4), np.uint8))
NINES = encoded(np.full((19, 20), 9, np.uint8))
PROGRESSIVE = encoded(SMOOTH, "JPEG", progressive=True)
SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
PAGES = tiff(np.zeros((50, 64, 64), np.uint8), photometric="minisblack", compression="zlib")
PALETTE = {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}


def test_what_must_not_be_decoded_is_refused(monkeypatch):
    """A TIFF by its headers: they may claim any number of pixels, and none is unpacked."""
    monkeypatch.setattr(tifffile.TiffPage, "asarray", None)
    for files, asked, reason in (
        ({"png": b"not an image"}, {}, "no readable PNG"),
        ({"png": b""}, {}, "an empty file"),
        ({"jpg": encoded(SMOOTH, "JPEG")[:400]}, {}, "JPEG"),
        ({"jpg": b"<!DOCTYPE html><html>"}, {}, "a web page, no image"),
        ({"png": b"version https://git-lfs.github.com/spec/v1"}, {}, "a Git LFS pointer, no image"),
        ({"jpg": b"\0\0\0\x1cftypheic\0\0\0\0"}, {}, "HEIC, which is not decoded"),
        ({"pyd": b"cos\nsystem\n(S'x'\ntR."}, {}, "no .png"),
        ({"png": TINY}, {"image_key": "npy"}, r"no \.npy"),
        ({"a.png": b"", "b.png": b""}, {}, "this one has a.png, b.png"),
        ({"png": TINY, "jpg": TINY}, {}, r"choose with data\.image_key=png"),
        ({"png": encoded(GREY.astype(np.uint16) * 257)}, {}, "a .png of uint16, but data.bits=8"),
        ({"png": encoded(DEEP[:, :, 0])}, {"bits": 32}, "data.bits=32 reads float32"),
        ({"png": TINY}, {"bits": 16}, "of uint8, but data.bits=16 reads uint16"),
        ({"png": encoded(CLEAR)}, {}, r"transparent pixels; set data\.background=white"),
        ({"png": encoded(GREY, transparency=int(GREY[0, 0]))}, {}, "transparent"),
        ({"png": encoded(COLOUR)}, {"channels": 4}, "no alpha channel, which"),
        ({"jpg": encoded(GREY, "JPEG")}, {"channels": 2}, "no alpha channel, which"),
        ({"png": encoded(np.zeros((101, 100), np.uint8))}, {}, "data.max_pixels=10000"),
        ({"png": with_header(NINES, height=20)}, {}, "its pixels end early"),
        ({"png": with_header(NINES, height=40, interlaced=1)}, {}, "damaged PNG"),
        ({"jpg": PROGRESSIVE[:-2] + 200 * SCAN + b"\xff\xd9"}, {}, "more than 100 scans"),
        ({"npy": npy(np.array([[print]], object))}, {}, "a .npy of object"),
        ({"npy": npy(GREY.astype(np.float32))}, {}, ".npy of float32, but data.bits=8"),
        ({"npy": npy(GREY)[:-1]}, {}, "the .npy is cut off"),
        ({"npy": npy(np.zeros((101, 100), np.uint8))}, {}, "data.max_pixels=10000"),
        ({"npy": npy(GREY).replace(b"(5, 7), } ", b"(True,7),}")}, {}, r"of shape \(True, 7\)"),
        ({"npy": npy(GREY)[:9]}, {}, "damaged npy"),
        ({"npy": npy(PLANES)}, {}, "3 channels, but data.channels=1"),
        ({"npy": npy(GREY[0])}, {}, r".npy of shape \(7,\)"),
        *(
            ({"npy": npy(np.full((4, 4), value, np.float32))}, {"bits": 32, "mask": mask}, "lie in")
            for value, mask in ((1.1, "none"), (-1.1, "none"), (np.nan, "none"), (np.inf, "nan"))
        ),
        ({"png": TINY}, {"mask": "nan"}, "a .png holds no NaN"),
        ({"png": TINY, "mask.png": encoded(GREY)}, {"mask": "member"}, "5 x 7 .* 4 x 4"),
        ({"png": TINY, "mask.png": b"no png"}, {"mask": "member"}, "readable PNG"),
        ({"png": TINY, "mask.png": b""}, {}, "set data.mask=member"),
        ({"tif": PAGES}, {"channels": 3}, r"4 channels, but data\.channels=3"),
        ({"tif": PAGES}, OWN, "more than 9 channels of this size"),
        ({"tif": tiff(GREY)[:40]}, {}, "damaged tif"),
        ({"tif": tiff(GREY)[:-1]}, {}, "it is cut off"),
        ({"tif": endless(tiff(GREY))}, {**OWN, "max_pixels": 10**6}, "more than 1000 channels"),
        ({"tif": tiff(GREY, **PALETTE)}, OWN, "PhotometricInterpretation PALETTE"),
        ({"tif": tiff(np.dstack([COLOUR, GREY]), photometric="separated")}, OWN, "SEPARATED"),
        ({"tif": tiff(COLOUR, photometric="ycbcr")}, OWN, "YCBCR"),
        ({"tif": tiff(COLOUR, photometric="cielab")}, OWN, "CIELAB"),
        ({"tif": tiff(GREY.astype(np.float32), photometric="miniswhite")}, OWN, "MINISWHITE"),
    ):
        with pytest.raises(DamagedSampleError, match=reason):
            decode_sample(files, **{"channels": 1, "max_pixels": 10_000, **asked})


def test_one_image_among_several():
    """Those of a plain suffix come before depth maps and the like; data.image_key chooses."""
    png, other = encoded(GREY), encoded(255 - GREY)
    both = {"__key__": "k", "png": png, "depth.png": other, "txt": b"a cat"}
    assert (decode_sample(both, channels=1, max_pixels=99) == GREY).all()
    chosen = decode_sample(both, channels=1, max_pixels=99, image_key="depth.png")
    assert (chosen == 255 - GREY).all()
