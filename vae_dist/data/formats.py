"""JPEG and PNG: the size, the orientation and the damage that Pillow does not tell of.

In: the bytes of a file. Out: JPEGs as uint8 (C, H, W), upright, by simplejpeg (libjpeg-turbo, about
twice as fast as Pillow), or None where Pillow must decide: CMYK, and what simplejpeg does not take
without calling its pixels damaged. Pillow passes over libjpeg's warnings and most checksums of a
PNG, so those are acted upon here.

libjpeg can decode at k/8 of the size. Only 1/2, 1/4 and 1/8 are used, and only of sides that these
divide: otherwise the last pixel stands for a part of one, and a resize stretches the picture.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from vae_dist.data.tar import DamagedSampleError

ORIENTATION_TAG = 0x0112
TRANSPOSED = (5, 6, 7, 8)  # orientations that swap height and width
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
START_OF_SCAN, MAX_SCANS = b"\xff\xda", 100  # each goes through the whole picture
# Warnings after which libjpeg makes pixels up: coded pixels end early, hold a code that is none, or
# go on where a restart marker or the next scan should be. No damage is what warns of the header
# alone: bytes between its segments, an unknown JFIF revision, odd parameters of a sequential scan.
WRONG_PIXELS = ("Corrupt JPEG data", "Inconsistent progression", "Premature end of JPEG")
# Cameras fill up files behind the last pixel.
PADDING = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd9")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def jpeg_header(data: bytes, max_pixels: int) -> tuple[int, int, str, int] | None:
    """Stored height and width, colour space, orientation. None: let Pillow decide. Raises
    DamagedSampleError."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_pixels(height, width, max_pixels)
    if data.count(START_OF_SCAN) > MAX_SCANS:
        raise DamagedSampleError(f"a JPEG of more than {MAX_SCANS} scans")
    turn = 1
    head = data[: data.find(START_OF_SCAN)]
    if EXIF in head or XMP in head:
        with contextlib.suppress(Exception):  # whether it is damaged, its decoder decides
            turn = orientation(Image.open(io.BytesIO(data), formats=("JPEG",)).info)
    return height, width, space, turn


def decode_jpeg(
    data: bytes, channels: int, *, max_pixels: int, at_least: tuple[int, int] | None = None
) -> np.ndarray | None:
    """channels: 1, 3, or 0 for its own. at_least: (H, W) that the caller shrinks it to. None: let
    Pillow decode it. Raises DamagedSampleError."""
    header = jpeg_header(data, max_pixels)
    if header is None:
        return None
    height, width, space, turn = header
    scale = 1
    if at_least is not None:
        scale = dct_scale(height, width, at_least[::-1] if turn in TRANSPOSED else at_least)
    least = (height // scale, width // scale) if scale > 1 else (0, 0)
    is_grey = channels == 1 or (channels == 0 and space == "Gray")
    is_cmyk = space in ("CMYK", "YCCK")  # decoded here for its damage alone
    try:
        space = "CMYK" if is_cmyk else "GRAY" if is_grey else "RGB"
        pixels = simplejpeg.decode_jpeg(data, space, min_height=least[0], min_width=least[1])
    except Exception as error:
        if str(error).startswith(WRONG_PIXELS) and not PADDING.match(str(error)):
            raise DamagedSampleError(f"damaged JPEG ({error})") from None
        return None
    return None if is_cmyk else upright(pixels, turn).transpose(2, 0, 1)


def dct_scale(height: int, width: int, needed: tuple[int, int]) -> int:
    """The largest of 1, 2, 4, 8 that divides both sides and leaves twice the needed pixels."""
    for scale in (8, 4, 2):
        is_whole = height % scale == width % scale == 0
        if is_whole and height >= 2 * needed[0] * scale and width >= 2 * needed[1] * scale:
            return scale
    return 1


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Refuse an image by its header, before memory is taken. Raises DamagedSampleError."""
    if width * height > max_pixels:
        raise DamagedSampleError(
            f"{width} x {height} pixels are more than data.max_pixels={max_pixels}"
        )


def orientation(info: dict[Any, Any]) -> int:
    """1 to 8 after the EXIF record in what Pillow knows of a file (`Image.info`), else after its
    XMP; 1 where there is none, or it is damaged."""
    if not any("exif" in str(key).lower() or "xmp" in str(key).lower() for key in info):
        return 1
    image = Image.Image()
    image.info = info
    try:
        return turn_of(image.getexif().get(ORIENTATION_TAG))
    except Exception:  # many kinds, of records that are damaged
        return 1


def turn_of(value: Any) -> int:
    """1 to 8 of the value of an orientation tag, whatever its type; 1 where it is none."""
    try:
        turn = int(value[0] if isinstance(value, bytes | tuple) else value)
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return 1
    return turn if turn in range(1, 9) else 1


def upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """(H, W, C) as it is meant to be seen, after its orientation `turn` (1: as it is)."""
    if turn in TRANSPOSED:
        pixels = pixels.transpose(1, 0, 2)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def is_png16(data: bytes) -> bool:
    """Whether the header of a PNG names 16 bits a channel."""
    return len(data) > 25 and bytes(data[:8]) == PNG_SIGNATURE and data[24] == 16


def values_of_png(data: bytes) -> int:
    """Of a pixel, after the colour type in the header of a PNG."""
    return {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[data[25]]


def check_png(data: bytes, image: Image.Image) -> None:
    """Decode `image`, which Pillow opened. Raises DamagedSampleError for a wrong checksum and for
    fewer pixels than the header promises."""
    view, at, coded = memoryview(data), len(PNG_SIGNATURE), []
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        checksum = view[at + 8 + length : at + 12 + length]
        if len(checksum) < 4:
            raise DamagedSampleError("damaged PNG (it is cut off)")
        if zlib.crc32(view[at + 4 : at + 8 + length]) != int.from_bytes(checksum, "big"):
            raise DamagedSampleError(f"damaged PNG (checksum of the {ascii(name)[2:-1]} chunk)")
        if name == b"IDAT":
            coded.append(view[at + 8 : at + 8 + length])
        if name == b"IEND":
            break
        at += 12 + length
    image.load()  # what a stream lacks that ends early is black in Pillow
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    if not data[28] and last_row.getbbox(alpha_only=False):
        return
    row = -(-image.width * data[24] * values_of_png(data) // 8)
    num_bytes = image.height * (row if data[28] else row + 1)  # if interlaced, some more
    if len(zlib.decompressobj().decompress(b"".join(coded), num_bytes)) < num_bytes:
        raise DamagedSampleError("damaged PNG (its pixels end early)")
