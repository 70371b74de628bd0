"""From the files of one sample to an image and a label, by an allow-list: nothing is unpickled.

In: a webdataset sample, `{"__key__": ..., "png": bytes, "cls": b"7", ...}`.
Out: uint8 image (C, H, W), upright, and an integer label, -1 where there is none.

JPEG is decoded by simplejpeg, everything else and what simplejpeg does not take by Pillow; TIFF by
tifffile (extra `science`); `.npy` by numpy, arrays (H, W) or (C, H, W) of uint8 without objects.
Grey becomes colour and colour grey; an alpha channel without transparent pixels is dropped, a
fourth channel is kept where `channels` is 4. What would lose something is refused by name.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vae_dist.data.jpeg import TRANSPOSED, decode_jpeg, orientation, upright
from vae_dist.data.tar import DamagedSampleError

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}  # by last extension
ARRAYS = ("npy", "tif", "tiff")  # any number of channels, none converted
SUFFIXES = (*FORMATS, *ARRAYS)
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's name of an image with that many channels
CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
MAX_NPY_HEADER = 10_000  # bytes
NO_LABEL = -1


def decode_sample(
    sample: Mapping[str, Any],
    *,
    channels: int,
    max_pixels: int,
    at_least: tuple[int, int] | None = None,
    room: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Image uint8 (channels, H, W) and label.

    at_least: (H, W) that the caller shrinks the image to; a JPEG may then be decoded at 1/2, 1/4
    or 1/8 of its size, as long as twice that many pixels are left.
    room: (channels, H, W), in memory as (H, W, channels): an image of that size may be decoded
    there and be `room` itself; what was in it is lost also where decoding fails.
    Raises DamagedSampleError, with the reason, for what cannot or must not be decoded.
    """
    names = [name for name in sample if name.rpartition(".")[2] in SUFFIXES]
    if len(names) != 1:
        found = ", ".join(names) or "no ." + ", .".join(SUFFIXES)
        raise DamagedSampleError(f"a sample has one image, this one has {found}")
    suffix = names[0].rpartition(".")[2]
    image = decode_image(
        suffix,
        sample[names[0]],
        channels=channels,
        max_pixels=max_pixels,
        at_least=at_least,
        room=room,
    )
    return image, _label(sample)


def decode_image(
    suffix: str,
    data: bytes,
    *,
    channels: int,
    max_pixels: int,
    at_least: tuple[int, int] | None = None,
    room: np.ndarray | None = None,
) -> np.ndarray:
    """One file of an allowed suffix as uint8 (channels, H, W). Raises DamagedSampleError."""
    if suffix in ARRAYS:
        return _with_channels(decode_array(suffix, data, max_pixels=max_pixels), channels)
    if suffix in ("jpg", "jpeg") and channels in (1, 3):
        place = None if room is None else room.transpose(1, 2, 0)
        pixels = decode_jpeg(data, channels, max_pixels=max_pixels, at_least=at_least, room=place)
        if pixels is not None:
            return pixels.transpose(2, 0, 1)
    return _decode_by_pillow(data, FORMATS[suffix], channels, max_pixels, at_least)


def _label(sample: Mapping[str, Any]) -> int:
    text = sample.get("cls")
    if text is None:
        return NO_LABEL
    try:
        label = int(text)
    except ValueError:
        raise DamagedSampleError(f".cls is no integer: {text[:20]!r}") from None
    if abs(label) >= 2**63:
        raise DamagedSampleError(f".cls is no integer of 64 bits: {text[:20]!r}")
    return label


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Refuse an image by its header, before memory is taken. Raises DamagedSampleError."""
    if width * height > max_pixels:
        raise DamagedSampleError(
            f"{width} x {height} pixels are more than data.max_pixels={max_pixels}"
        )


def open_by_pillow(data: bytes, image_format: str, max_pixels: int) -> Image.Image:
    """The image before its pixels are decoded. Raises DamagedSampleError."""
    try:
        image = Image.open(io.BytesIO(data), formats=(image_format,))
    except Exception as error:  # Pillow raises many kinds on damaged bytes
        raise DamagedSampleError(f"no readable {image_format} ({_short(error)})") from None
    check_pixels(image.height, image.width, max_pixels)
    # Pillow narrows 16-bit colour to 8 bits without a word
    if image.mode.startswith("I") or image.mode == "F" or (image_format == "PNG" and data[24] > 8):
        raise DamagedSampleError("more than 8 bits a channel; convert it to 8 bits")
    if image.mode not in CONVERTIBLE:
        raise DamagedSampleError(f"images of mode {image.mode} cannot be read; convert it to RGB")
    return image


def _decode_by_pillow(
    data: bytes,
    image_format: str,
    channels: int,
    max_pixels: int,
    at_least: tuple[int, int] | None,
) -> np.ndarray:
    image = open_by_pillow(data, image_format, max_pixels)
    if channels not in MODES:
        raise DamagedSampleError(f"a {image_format} has no {channels} channels; use .npy or .tif")
    turn = orientation(data) if image_format == "JPEG" else _orientation_of(image)
    try:
        if at_least is not None:
            height, width = at_least[::-1] if turn in TRANSPOSED else at_least
            image.draft(MODES[channels], (2 * width, 2 * height))
        pixels = np.asarray(_converted(image, MODES[channels]))
    except DamagedSampleError:
        raise
    except Exception as error:
        raise DamagedSampleError(f"damaged {image_format} ({_short(error)})") from None
    pixels = upright(pixels.reshape(*pixels.shape[:2], channels), turn)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in another mode; alpha is dropped only where it says nothing."""
    if image.mode == mode and "transparency" not in image.info:
        return image
    transparent = "transparency" in image.info or image.mode in ("LA", "PA", "RGBA")
    if transparent and mode in ("L", "RGB"):
        image = image.convert("RGBA")
        if image.getchannel("A").histogram()[255] < image.width * image.height:
            raise DamagedSampleError(
                "transparent pixels; pack the images with background=white or black, or set "
                "data.channels=4"
            )
    return image.convert(mode)


def _orientation_of(image: Image.Image) -> int:
    """1 to 8 from the EXIF record, 1 where there is none. Raises DamagedSampleError."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception as error:
        raise DamagedSampleError(f"damaged EXIF record ({_short(error)})") from None


def decode_array(suffix: str, data: bytes, *, max_pixels: int) -> np.ndarray:
    """A .npy or TIFF as uint8 (C, H, W), with as many channels as it has.

    Raises DamagedSampleError.
    """
    return _decode_npy(data, max_pixels) if suffix == "npy" else _decode_tiff(data, max_pixels)


def _decode_npy(data: bytes, max_pixels: int) -> np.ndarray:
    """uint8 (H, W) or (C, H, W); the header is believed only if the bytes are there."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, by_column, kind = read(file, max_header_size=MAX_NPY_HEADER)
    except (ValueError, EOFError, struct.error, SyntaxError, TypeError) as error:
        raise DamagedSampleError(f"no readable .npy ({_short(error)})") from None
    if kind != np.uint8:
        raise DamagedSampleError(f".npy of {kind}; only uint8 arrays are images here")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise DamagedSampleError(f".npy of shape {shape}; images are (H, W) or (C, H, W)")
    check_pixels(shape[-2], shape[-1], max_pixels)
    count = int(np.prod(shape, dtype=object))
    if len(data) - file.tell() != count:
        raise DamagedSampleError(
            f"the .npy is cut off: {len(data) - file.tell()} of {count} bytes of pixels"
        )
    pixels = np.frombuffer(data, np.uint8, count, offset=file.tell())
    pixels = pixels.reshape(shape, order="F" if by_column else "C")
    return pixels[None] if len(shape) == 2 else pixels


def _decode_tiff(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        import tifffile
    except ImportError:
        raise DamagedSampleError(
            "TIFF images need tifffile: pip install 'vae_dist[science]'"
        ) from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            page: Any = tiff.pages[0]
            check_pixels(page.imagelength, page.imagewidth, max_pixels)
            if page.dtype != np.uint8:
                raise DamagedSampleError(f"TIFF of {page.dtype}; convert it to 8 bits")
            if len(tiff.pages) > 1 and tiff.series[0].ndim > 3:
                raise DamagedSampleError(f"TIFF of shape {tiff.series[0].shape}; one image a file")
            pixels, axes = tiff.series[0].asarray(), tiff.series[0].axes
    except DamagedSampleError:
        raise
    except Exception as error:  # tifffile raises many kinds on damaged bytes
        raise DamagedSampleError(f"damaged TIFF ({_short(error)})") from None
    if pixels.ndim == 2:
        return pixels[None]
    return pixels.transpose(2, 0, 1) if axes.endswith("S") else pixels


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (C, H, W) with the wanted C: repeated from grey, otherwise it must be there."""
    if len(pixels) == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=0)
    if len(pixels) != channels:
        raise DamagedSampleError(f"{len(pixels)} channels, but data.channels={channels}")
    return np.ascontiguousarray(pixels)


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0].split(" <_io")[0][:100]
