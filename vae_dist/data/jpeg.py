"""JPEG by simplejpeg (libjpeg-turbo), about twice as fast as Pillow; what is upright, of any kind.

In: the bytes of a JPEG. Out: uint8 (C, H, W), upright; or None where Pillow must decide: CMYK, or
what simplejpeg does not take but does not call damaged pixels either. Pillow does not hear
libjpeg's warnings, so those are acted upon here.

libjpeg can decode at k/8 of the size. Only 1/2, 1/4 and 1/8 are used, and only of sides that these
divide: otherwise the last pixel stands for a part of one, and a resize stretches the picture.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from vae_dist.data.tar import DamagedSampleError

ORIENTATION_TAG = 0x0112
TRANSPOSED = (5, 6, 7, 8)  # orientations that swap height and width
COLOURSPACES = {1: "GRAY", 3: "RGB", 4: "CMYK"}
APP1, SOF2, SOS = 0xE1, 0xC2, 0xDA  # EXIF or XMP, a progressive frame, the first pixels
XMP = b"http://ns.adobe.com/xap/1.0/\0"
MAX_SCANS = 100  # each goes through the whole picture, however few bytes it has
# Warnings after which libjpeg makes pixels up: coded pixels end early, hold a code that is none, or
# go on where a restart marker or the next scan should be. No damage is what warns of the header
# alone: bytes between its segments, an unknown JFIF revision, odd parameters of a sequential scan.
WRONG_PIXELS = ("Corrupt JPEG data", "Inconsistent progression", "Premature end of JPEG")
# Cameras fill up files behind the last pixel.
PADDING = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd9")


class JpegHeader(NamedTuple):
    height: int  # as it is stored
    width: int
    channels: int
    turn: int  # orientation


def jpeg_header(data: bytes, max_pixels: int) -> JpegHeader | None:
    """None: let Pillow decide. Raises DamagedSampleError for more than max_pixels or MAX_SCANS."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_pixels(height, width, max_pixels)
    channels = {"Gray": 1, "CMYK": 4, "YCCK": 4}.get(space, 3)
    return JpegHeader(height, width, channels, _read_segments(data, channels))


def _read_segments(data: bytes, channels: int) -> int:
    """The orientation, after the segments in front of the pixels. Raises DamagedSampleError."""
    at, is_progressive = 2, False
    info: dict[Any, Any] = {}
    while at + 5 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == SOS:
            if is_progressive or data[at + 4] < channels:  # else there is one scan
                num_scans = data.count(b"\xff\xda", at)
                if num_scans > MAX_SCANS:
                    raise DamagedSampleError(f"a JPEG of {num_scans} scans; {MAX_SCANS} are read")
            break
        stop = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == APP1:
            if data.startswith(b"Exif\0\0", at + 4):
                info.setdefault("exif", data[at + 4 : stop])
            elif data.startswith(XMP, at + 4):
                info["xmp"] = data[at + 4 + len(XMP) : stop]
        is_progressive |= marker == SOF2
        at = max(stop, at + 4)
    return orientation(info) if info else 1


def read_jpeg(
    data: bytes,
    header: JpegHeader,
    channels: int,
    *,
    at_least: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray | None:
    """uint8 (channels, H, W), channels 1 or 3, or None: let Pillow convert it.

    at_least: (H, W) that the caller shrinks it to. out: (channels, H, W), in memory as (H, W,
    channels); an upright image of that size is decoded there, and is `out` itself. Raises
    DamagedSampleError for damaged pixels.
    """
    height, width, stored, turn = header
    space = COLOURSPACES[4 if stored == 4 else channels]
    try:
        is_final = stored != 4 and turn == 1
        if out is not None and is_final and out.shape == (channels, height, width):
            simplejpeg.decode_jpeg(data, space, buffer=out.transpose(1, 2, 0))
            return out
        scale = 1
        if at_least is not None:
            scale = dct_scale(height, width, at_least[::-1] if turn in TRANSPOSED else at_least)
        least = (height // scale, width // scale) if scale > 1 else (0, 0)
        pixels = simplejpeg.decode_jpeg(data, space, min_height=least[0], min_width=least[1])
    except Exception as error:
        if str(error).startswith(WRONG_PIXELS) and not PADDING.match(str(error)):
            raise DamagedSampleError(f"damaged JPEG ({error})") from None
        return None
    return None if stored == 4 else upright(pixels, turn).transpose(2, 0, 1)


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
