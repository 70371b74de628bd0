from __future__ import annotations

import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from vae_dist.data.decode import decode_own, decode_sample, size_of_sample
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import ImageSettings, transform

GREY = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
SMOOTH = np.add.outer(np.arange(64), 2 * np.arange(96)).astype(np.uint8)


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, image_format, **options)
    return data.getvalue()


def decode(data: bytes, suffix: str = "png", *, channels: int = 1, **kwargs: Any) -> np.ndarray:
    settings = {"max_pixels": 10_000, **kwargs}
    return decode_sample({"__key__": "k", suffix: data}, channels=channels, **settings)


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("source", [GREY, COLOUR, SMOOTH, np.zeros_like(GREY)])
def test_png_of_every_kind_of_filter(source: np.ndarray, level: int) -> None:
    image = Image.fromarray(source)
    got = decode(encode(image, compress_level=level), channels=3 if source.ndim == 3 else 1)
    np.testing.assert_array_equal(got.transpose(1, 2, 0).squeeze(), source)


def png16(pixels: np.ndarray) -> bytes:
    """uint16 (H, W) or (H, W, C) as a PNG, written by hand: Pillow has no 16-bit colour."""
    height, width, channels = pixels.shape if pixels.ndim == 3 else (*pixels.shape, 1)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


DEEP = np.random.default_rng(2).integers(0, 65536, (5, 7, 4), dtype=np.uint16)
FLOATS = np.random.default_rng(3).uniform(-1, 1, (2, 5, 7)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_keeps_its_levels(channels: int) -> None:
    pixels = DEEP[:, :, :channels] if channels > 1 else DEEP[:, :, 0]
    got = decode(png16(pixels), channels=channels, bits=16)
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, DEEP[:, :, :channels].transpose(2, 0, 1))


def test_16_bit_grey_becomes_colour_and_opaque_alpha_is_dropped() -> None:
    grey = decode(png16(DEEP[:, :, 0]), channels=3, bits=16)
    np.testing.assert_array_equal(grey, np.broadcast_to(DEEP[:, :, 0], (3, 5, 7)))
    opaque = DEEP.copy()
    opaque[:, :, 3] = 65535
    got = decode(png16(opaque), channels=3, bits=16)
    np.testing.assert_array_equal(got, DEEP[:, :, :3].transpose(2, 0, 1))
    with pytest.raises(DamagedSampleError, match=r"transparent pixels; set data\.background"):
        decode(png16(DEEP), channels=3, bits=16)


@pytest.mark.parametrize("suffix", ["npy", "tif"])
@pytest.mark.parametrize(("bits", "kind"), [(16, np.uint16), (16, ">u2"), (32, np.float32)])
def test_deep_arrays_are_exact(suffix: str, bits: int, kind: Any) -> None:
    source = FLOATS if bits == 32 else DEEP.transpose(2, 0, 1)[:2]
    data = npy(source.astype(kind)) if suffix == "npy" else tiff(source.astype(kind))
    got = decode(data, suffix, channels=2, bits=bits)
    assert got.dtype == source.dtype and got.dtype.isnative
    np.testing.assert_array_equal(got, source)


@pytest.mark.parametrize(
    ("suffix", "data", "bits", "reason"),
    [
        ("png", encode(Image.fromarray(GREY)), 16, "of uint8, but data.bits=16 reads uint16"),
        (
            "jpg",
            encode(Image.fromarray(GREY), "JPEG"),
            16,
            "of uint8, but data.bits=16 reads uint16",
        ),
        ("png", png16(DEEP), 32, "data.bits=32 reads float32"),
        ("png", png16(DEEP), 8, "a .png of uint16, but data.bits=8"),
        ("png", png16(DEEP)[:80], 16, "damaged PNG"),
    ],
)
def test_another_depth_is_refused(suffix: str, data: bytes, bits: int, reason: str) -> None:
    with pytest.raises(DamagedSampleError, match=reason):
        decode(data, suffix, channels=4, bits=bits)


@pytest.mark.parametrize("value", [1.5, -1.001, np.nan, np.inf])
def test_floats_outside_of_their_range_are_refused(value: float) -> None:
    bad = FLOATS.copy()
    bad[1, 2, 3] = value
    with pytest.raises(DamagedSampleError, match=r"float images lie in \[-1, 1\]"):
        decode(npy(bad), "npy", channels=2, bits=32)


def test_grey_and_colour_become_what_is_asked() -> None:
    grey_as_colour = decode(encode(Image.fromarray(GREY)), channels=3)
    np.testing.assert_array_equal(grey_as_colour, np.broadcast_to(GREY, (3, 5, 7)))
    luma = decode(encode(Image.fromarray(COLOUR)), channels=1)[0]
    np.testing.assert_allclose(luma, COLOUR @ np.array([0.299, 0.587, 0.114]), atol=1)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_are_converted(mode: str) -> None:
    image = Image.fromarray(COLOUR).convert(mode)
    suffix, image_format = ("jpg", "JPEG") if mode == "CMYK" else ("png", "PNG")
    assert decode(encode(image, image_format), suffix, channels=3).shape == (3, 5, 7)


@pytest.mark.parametrize(
    ("suffix", "image_format"),
    [("jpg", "JPEG"), ("JPEG", "JPEG"), ("webp", "WEBP"), ("view.jpg", "JPEG")],
)
def test_lossy_formats(suffix: str, image_format: str) -> None:
    data = encode(Image.fromarray(SMOOTH), image_format, quality=95)
    error = np.abs(decode(data, suffix.lower())[0].astype(int) - SMOOTH)
    assert np.median(error) <= 3


@pytest.mark.parametrize(
    ("size", "at_least", "decoded"),
    [
        ((640, 960), (64, 64), (160, 240)),  # 1/4; 1/8 would leave 80 rows
        ((641, 963), (80, 80), (641, 963)),  # no scale divides both
        ((1024, 1024), (64, 64), (128, 128)),
        ((255, 300), (64, 64), (255, 300)),
    ],
)
def test_jpeg_scales_are_powers_of_two(
    size: tuple[int, int],
    at_least: tuple[int, int],
    decoded: tuple[int, int],
) -> None:
    y, x = np.meshgrid(*(np.linspace(0, 200, n) for n in size), indexing="ij")
    data = encode(Image.fromarray((x / 2 + y / 2).astype(np.uint8)), "JPEG")
    got = decode(data, "jpg", channels=3, max_pixels=10**8, at_least=at_least)
    assert got.shape == (3, *decoded)
    y, x = np.meshgrid(*(np.linspace(0, 200, n) for n in decoded), indexing="ij")
    assert np.abs(got - (x / 2 + y / 2)).max() < 8


def test_simplejpeg_and_pillow_agree() -> None:
    data = encode(Image.fromarray(COLOUR).resize((64, 48)), "JPEG", quality=90)
    by_pillow = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
    np.testing.assert_allclose(decode(data, "jpg", channels=3), by_pillow, atol=2)


def test_damaged_pixels_of_a_jpeg_are_refused() -> None:
    """Every other kind of damage that libjpeg only warns of: Pillow would show what it made up."""
    image = Image.fromarray(np.add.outer(3 * np.arange(32), np.arange(48)).astype(np.uint8))
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}):
        whole = encode(image, "JPEG", **options)
        right = decode(whole, "jpg")
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
        assert (decode(whole + b"abc", "jpg") == right).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_touched_byte_of_a_png_is_refused(bits: int) -> None:
    """Also the last ones of the pixels, which Pillow does not compare with their checksum."""
    ramp = SMOOTH[:12, :12]
    whole = encode(Image.fromarray(ramp)) if bits == 8 else png16(ramp.astype(np.uint16))
    decode(whole, bits=bits)
    for at in range(len(whole)):
        data = whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :]
        with pytest.raises(DamagedSampleError):
            decode(data, bits=bits)
    assert (decode(whole[:-12], bits=bits) == decode(whole, bits=bits)).all()  # no end mark
    with pytest.raises(DamagedSampleError, match="cut off"):
        decode(whole[:-13], bits=bits)


def test_a_jpeg_with_harmless_warnings_is_read() -> None:
    whole = encode(Image.fromarray(SMOOTH), "JPEG")
    right = decode(whole, "jpg")
    tables = whole.index(b"\xff\xc4")
    scan = whole.index(b"\xff\xda")
    harmless = {
        "between segments": whole[:tables] + b"abc" + whole[tables:],
        "behind the pixels": whole[:-2] + bytes(20) + whole[-2:],
        "odd parameters": whole[: scan + 8] + b"\x3e" + whole[scan + 9 :],
        "JFIF revision": whole[:11] + b"\x09" + whole[12:],
    }
    for name, data in harmless.items():
        with pytest.raises(ValueError):
            simplejpeg.decode_jpeg(data, "GRAY")
        assert (decode(data, "jpg") == right).all(), name


def test_arrays_of_any_number_of_channels() -> None:
    five = np.random.default_rng(2).integers(0, 256, (5, 6, 7), dtype=np.uint8)
    np.testing.assert_array_equal(decode(npy(five), "npy", channels=5), five)
    np.testing.assert_array_equal(decode(npy(np.asfortranarray(five)), "npy", channels=5), five)
    np.testing.assert_array_equal(decode(npy(GREY), "npy"), GREY[None])
    assert decode(npy(GREY), "npy", channels=3).shape == (3, 5, 7)
    np.testing.assert_array_equal(
        decode(tiff(five, photometric="minisblack", planarconfig="separate"), "tif", channels=5),
        five,
    )
    np.testing.assert_array_equal(
        decode(tiff(COLOUR), "tiff", channels=3), COLOUR.transpose(2, 0, 1)
    )


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("separate", [False, True])
def test_a_tiff_is_turned_upright_after_its_orientation(turn: int, separate: bool) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    stored = pixels.transpose(2, 0, 1) if separate else pixels
    options = {"planarconfig": "separate"} if separate else {}
    tags = [(274, "H", 1, turn, True)]
    data = tiff(stored, photometric="rgb", extratags=tags, **options)
    exif = Image.Exif()
    exif[0x0112] = turn
    png = Image.open(io.BytesIO(encode(Image.fromarray(pixels), exif=exif)))
    expected = np.asarray(ImageOps.exif_transpose(png)).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(data, "tif", channels=3), expected)
    assert size_of_sample({"tif": data}, max_pixels=35) == expected.shape[1:]


def test_what_the_values_of_a_tiff_mean() -> None:
    for source in (GREY, GREY.astype(np.uint16)):
        inverted = np.iinfo(source.dtype).max - source
        got = decode(tiff(inverted, photometric="miniswhite"), "tif", bits=8 * source.itemsize)
        np.testing.assert_array_equal(got[0], source)
    by_jpeg = tiff(np.full((16, 16, 3), (200, 30, 60), np.uint8), compression="jpeg")
    np.testing.assert_allclose(decode(by_jpeg, "tif", channels=3)[:, 0, 0], (200, 30, 60), atol=2)
    colours = np.zeros((3, 256), np.uint16)
    cmyk = np.dstack([COLOUR, GREY])
    refused = {
        "PALETTE": tiff(GREY, photometric="palette", colormap=colours),
        "SEPARATED": tiff(cmyk, photometric="separated"),
        "YCBCR": tiff(COLOUR, photometric="ycbcr"),
        "CIELAB": tiff(COLOUR, photometric="cielab"),
        "MINISWHITE": tiff(FLOATS[0], photometric="miniswhite"),
    }
    for name, data in refused.items():
        for channels in (1, 3, 4):
            with pytest.raises(DamagedSampleError, match=f"PhotometricInterpretation {name}|chann"):
                decode(data, "tif", channels=channels, bits=32 if name == "MINISWHITE" else 8)
        with pytest.raises(DamagedSampleError, match=name):
            size_of_sample({"tif": data}, max_pixels=1000)


def test_a_tiff_is_judged_by_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pages of few bytes, and the size of a bucket: no pixel is unpacked for either."""
    import tifffile

    bomb = tiff(np.zeros((50, 64, 64), np.uint8), photometric="minisblack", compression="zlib")
    five = tiff(np.zeros((5, 8, 9), np.uint8), photometric="minisblack")

    def unpack(*args: object, **kwargs: object) -> None:
        raise AssertionError("pixels are unpacked")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", unpack)
    with pytest.raises(DamagedSampleError, match=r"4 channels, but data\.channels=3"):
        decode(bomb, "tif", channels=3)
    with pytest.raises(DamagedSampleError, match="more than 9 channels of this size"):
        decode_own("tif", bomb, max_pixels=10_000)
    with pytest.raises(DamagedSampleError, match="4 channels, but"):
        decode(bomb, "tif", channels=3, mask="nan", bits=32)
    assert size_of_sample({"tif": five}, max_pixels=72) == (8, 9)
    with pytest.raises(DamagedSampleError, match="9 x 8 pixels are more"):
        size_of_sample({"tif": five}, max_pixels=71)


def test_four_channels_keep_alpha() -> None:
    got = decode(encode(CLEAR), channels=4)
    np.testing.assert_array_equal(got, np.asarray(CLEAR).transpose(2, 0, 1))
    assert (decode(encode(OPAQUE), channels=3) == COLOUR.transpose(2, 0, 1)).all()
    assert decode(encode(Image.fromarray(GREY).convert("LA")), channels=2).shape == (2, 5, 7)


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_no_channel_is_made_up(mode: str, image_format: str, channels: int) -> None:
    image = Image.fromarray(COLOUR).convert(mode)
    if mode == "CMYK" and image_format != "JPEG":
        image = image.convert("P")
    with pytest.raises(DamagedSampleError, match="no alpha channel, which"):
        decode(encode(image, image_format), image_format.lower(), channels=channels)


CLEAR = Image.fromarray(np.dstack([COLOUR, GREY % 250]))  # no pixel is opaque
OPAQUE = Image.fromarray(COLOUR).convert("RGBA")


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    import tifffile

    data = io.BytesIO()
    tifffile.imwrite(data, array, **options)
    return data.getvalue()


def npy_header(shape: tuple[int, ...]) -> bytes:
    """A .npy that claims a shape and has no pixels."""
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        data, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return data.getvalue()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"png": encode(Image.fromarray(GREY))[:60]}, "damaged PNG|no readable PNG"),
        ({"png": b"not an image"}, "no readable PNG"),
        ({"png": b""}, "an empty file"),
        ({"jpg": encode(Image.fromarray(SMOOTH), "JPEG")[:400]}, "JPEG"),
        ({"jpg": b"<!DOCTYPE html><html>"}, "a web page, no image"),
        ({"png": b"version https://git-lfs.github.com/spec/v1"}, "a Git LFS pointer, no image"),
        ({"jpg": b"\0\0\0\x1cftypheic\0\0\0\0"}, "HEIC, which is not decoded"),
        ({"png": png16(np.zeros((1, 2, 3), np.uint16))}, "of uint16, but data.bits=8"),
        (
            {"png": encode(Image.fromarray(GREY.astype(np.uint16) * 257))},
            "of uint16, but data.bits=8",
        ),
        ({"png": encode(CLEAR)}, "transparent pixels; set data.background=white"),
        ({"png": encode(Image.fromarray(GREY), transparency=int(GREY[0, 0]))}, "transparent"),
        ({"npy": npy(np.array([[print]], object))}, "a .npy of object"),
        ({"npy": npy(GREY.astype(np.float32))}, ".npy of float32, but data.bits=8"),
        ({"npy": npy(GREY)[:-1]}, "the .npy is cut off: 34 of 35 bytes"),
        ({"npy": npy_header((10**6, 10**6))}, "data.max_pixels=10000"),
        ({"npy": npy_header((10**12, 1, 1))}, "the .npy is cut off: 0 of 1000000000000"),
        ({"npy": npy(GREY)[:9]}, "damaged npy"),
        ({"npy": npy(COLOUR.transpose(2, 0, 1))}, "3 channels, but data.channels=1"),
        ({"npy": npy(GREY[0])}, r".npy of shape \(7,\)"),
        ({"tif": tiff(GREY.astype(np.uint16))}, "a .tif of uint16, but data.bits=8 reads uint8"),
        ({"tif": tiff(GREY)[:40]}, "damaged tif"),
        ({"png": encode(Image.fromarray(np.zeros((101, 100), np.uint8)))}, "data.max_pixels=10000"),
        ({"pyd": b"cos\nsystem\n(S'x'\ntR."}, "no .png"),
        ({"a.png": b"", "b.png": b""}, "this one has a.png, b.png"),
    ],
)
def test_what_must_not_be_decoded_is_refused(files: dict[str, bytes], reason: str) -> None:
    with pytest.raises(DamagedSampleError, match=reason):
        decode_sample({"__key__": "k", **files}, channels=1, max_pixels=10_000)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_the_content_decides_and_not_the_suffix(kind: str) -> None:
    data = encode(Image.fromarray(GREY), kind, **({"lossless": True} if kind == "WEBP" else {}))
    image = decode_sample({"__key__": "k", "jpg": data}, channels=1, max_pixels=10**4)
    np.testing.assert_array_equal(image[0], GREY)
    assert size_of_sample({"__key__": "k", "jpg": data}, max_pixels=10**4) == GREY.shape


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_tiffs_of_few_bits_are_scaled_to_bytes(bits: int) -> None:
    top = (1 << bits) - 1
    import tifffile

    shades = np.arange(64, dtype=np.uint8).reshape(8, 8) % (top + 1)
    file = io.BytesIO()
    tifffile.imwrite(file, shades, bitspersample=bits, photometric="minisblack")
    sample = {"__key__": "k", "tif": file.getvalue()}
    image = decode_sample(sample, channels=1, max_pixels=10**4)
    np.testing.assert_array_equal(image[0], shades * (255 // top))


@pytest.mark.parametrize("background", ["white", "black"])
def test_transparent_pixels_lie_on_the_background(background: str) -> None:
    ground = Image.new("RGBA", CLEAR.size, background)
    expected = np.asarray(Image.alpha_composite(ground, CLEAR).convert("RGB")).transpose(2, 0, 1)
    got = decode(encode(CLEAR), channels=3, background=background)
    assert np.abs(got.astype(int) - expected).max() <= 1
    grey = decode(encode(CLEAR), channels=1, background=background)
    np.testing.assert_array_equal(
        grey, np.asarray(Image.fromarray(got.transpose(1, 2, 0)).convert("L"))[None]
    )
    assert decode(encode(CLEAR), channels=4, background=background).shape == (4, 5, 7)
    deep = decode(png16(DEEP), channels=3, bits=16, background=background)
    alpha = DEEP[:, :, 3:] / 65535
    wanted = DEEP[:, :, :3] * alpha + (1 - alpha) * 65535 * (background == "white")
    assert np.abs(deep.transpose(1, 2, 0) - wanted).max() <= 1


def jpeg_with(kind: int, turn: int, xmp: int = 0) -> bytes:
    """An orientation of a TIFF type (1 byte, 3 and 4 integers, 2 text), and one in XMP."""
    value = {1: bytes([turn]), 2: b"%d\0" % turn, 3: struct.pack("<H", turn)}.get(kind)
    value = (value or struct.pack("<I", turn)).ljust(4, b"\0")
    entry = struct.pack("<HHI", 0x0112, kind, 2 if kind == 2 else 1) + value
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)
    packet = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="%d"/>' % xmp
    whole = encode(Image.fromarray(SMOOTH), "JPEG")
    records = ([exif] if turn else []) + ([packet] if xmp else [])
    segments = (b"\xff\xe1" + struct.pack(">H", len(r) + 2) + r for r in records)
    return whole[:2] + b"".join(segments) + whole[2:]


@pytest.mark.parametrize("turn", range(1, 9))
def test_images_are_turned_upright_whatever_says_so(turn: int) -> None:
    """EXIF of any type, else XMP; the size in the header is that of the upright image."""
    exif = Image.Exif()
    exif[0x0112] = turn
    image = Image.fromarray(SMOOTH)
    whole = encode(image, "JPEG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(whole))))
    files = [("jpg", jpeg_with(kind, turn, xmp=3)) for kind in (1, 2, 3, 4)]
    files += [("jpg", jpeg_with(3, 0, xmp=turn)), ("jpg", whole)]
    files += [("png", encode(image, exif=exif)), ("webp", encode(image, "WEBP", exif=exif))]
    for number, (suffix, data) in enumerate(files):
        got = decode(data, suffix)
        assert np.abs(got[0].astype(int) - upright).mean() < 2, (number, suffix)
        assert size_of_sample({suffix: data}, max_pixels=10**4) == got.shape[1:]
    with pytest.raises(DamagedSampleError, match="max_pixels=100"):
        size_of_sample({"jpg": whole}, max_pixels=100)


@pytest.mark.parametrize("side", [256, 257, 514, 519])
def test_a_reduced_jpeg_becomes_the_picture_of_the_full_one(side: int) -> None:
    noise = np.random.default_rng(4).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
    data = encode(picture, "JPEG", quality=95)
    settings = ImageSettings(3, (32, 32), True, 10**6)
    small, full = (
        transform(
            decode(data, "jpg", channels=3, max_pixels=10**6, at_least=at_least),
            settings,
            seed=0,
            epoch=0,
            sample=0,
        ).astype(float)
        for at_least in ((32, 32), None)
    )
    assert 10 * np.log10(255**2 / max(1e-9, ((small - full) ** 2).mean())) > 40


def short_png(rows: int, interlaced: int = 0) -> bytes:
    """20 x 20 grey pixels, of which so many rows are there; all else is in order."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", 20, 20, 8, 0, 0, 0, interlaced)
    pixels = zlib.compress(b"".join(b"\0" + bytes([9] * 20) for _ in range(rows)))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bare_tiff(height: int, width: int, following: int) -> bytes:
    """An uncompressed page of a grey TIFF, by hand; `following`: where the next page is."""
    sizes = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: height}
    sizes[279] = height * width
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sizes.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(sizes)) + tags + struct.pack("<I", following)
    return head.ljust(200, b"\0") + bytes(100)


def test_what_promises_more_than_it_holds_is_refused_at_once() -> None:
    progressive = encode(Image.fromarray(SMOOTH), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    bombs = {
        "its pixels end early": ("png", short_png(19)),
        "damaged PNG": ("png", short_png(9, interlaced=1)),
        r"of \d+ scans; 100 are read": ("jpg", progressive[:-2] + 200 * scan + b"\xff\xd9"),
        "more than 1000 channels": ("tif", bare_tiff(2, 2, following=8)),  # a ring of pages
        "it is cut off": ("tif", bare_tiff(200, 200, following=0)),
        r"of shape \(True, 5\)": ("npy", npy_header((True, 5)) + bytes(5)),
    }
    assert decode(short_png(20)).min() == 9
    assert decode_own("tif", bare_tiff(9, 9, 0), max_pixels=99).shape == (1, 9, 9)
    for reason, (suffix, data) in bombs.items():
        started = time.process_time()
        with pytest.raises(DamagedSampleError, match=reason):
            decode_own(suffix, data, max_pixels=10**6)
        assert time.process_time() - started < 5


def test_one_image_among_several() -> None:
    """Those of a plain suffix come before depth maps and the like; data.image_key chooses."""
    png, other = encode(Image.fromarray(GREY)), encode(Image.fromarray(255 - GREY))
    both = {"__key__": "k", "png": png, "depth.png": other, "txt": b"a cat"}
    assert (decode_sample(both, channels=1, max_pixels=99) == GREY).all()
    chosen = decode_sample(both, channels=1, max_pixels=99, image_key="depth.png")
    assert (chosen == 255 - GREY).all()
    with pytest.raises(DamagedSampleError, match=r"no \.npy"):
        decode_sample(both, channels=1, max_pixels=99, image_key="npy")
    with pytest.raises(DamagedSampleError, match=r"choose with data\.image_key=png"):
        decode_sample({"png": png, "jpg": other}, channels=1, max_pixels=99)
