"""JPEG by simplejpeg (libjpeg-turbo), about twice as fast as Pillow.

In: the bytes of a JPEG. Out: uint8 (H, W, C), upright after its EXIF orientation; or None where
Pillow must decide: simplejpeg is not installed, CMYK, or what it does not take but does not call
damaged pixels either. Pillow does not hear libjpeg's warnings, so those are acted upon here.

libjpeg can decode at k/8 of the size. Only 1/2, 1/4 and 1/8 are used: the other scales are slower
and round the grid up, so that a resize afterwards stretches the picture.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import numpy as np

from vae_dist.data.pixels import check_pixels
from vae_dist.data.tar import DamagedSampleError

try:
    import simplejpeg
except ImportError:  # no wheel for this machine: Pillow decodes
    simplejpeg = None

COLOURSPACES = {1: "GRAY", 3: "RGB"}
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
ORIENTATION_TAG = 0x0112
SHORT = 3  # TIFF type: 16 bits
EXIF_MARK = b"Exif\0\0"
MAX_SEGMENT = 1 << 16  # bytes
SHORT_HEAD = 1 << 11  # bytes, enough for the tables of most files
START_OF_SCAN = b"\xff\xda"
# Warnings after which libjpeg makes pixels up: coded pixels end early, hold a code that is none, or
# go on where a restart marker or the next scan should be. No damage is what warns of the header
# alone: bytes between its segments, an unknown JFIF revision, odd parameters of a sequential scan.
WRONG_PIXELS = ("Corrupt JPEG data", "Inconsistent progression", "Premature end of JPEG")
# Cameras fill up files behind the last pixel.
PADDING = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd9")
SEGMENTS_IN_FRONT = frozenset((*range(0xE0, 0xF0), 0xFE))  # APP0 to APP15, comments


class JpegHeader(NamedTuple):
    height: int
    width: int
    turn: int  # EXIF orientation

    @property
    def upright_size(self) -> tuple[int, int]:
        size = self.height, self.width
        return size[::-1] if self.turn in TRANSPOSED else size


def jpeg_header(data: bytes | memoryview, *, max_pixels: int) -> JpegHeader | None:
    """None: let Pillow decide. Raises DamagedSampleError for more than max_pixels."""
    if simplejpeg is None:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_pixels(height, width, max_pixels)
    return None if space == "CMYK" else JpegHeader(height, width, orientation(data))


def read_jpeg(
    data: bytes | memoryview,
    header: JpegHeader,
    channels: int,
    *,
    at_least: tuple[int, int] | None,
    out: np.ndarray | None = None,
) -> np.ndarray | None:
    """uint8 (channels, H, W), channels 1 or 3, or None: let Pillow try.

    out: (channels, H, W), in memory as (H, W, channels); an upright image of that size is decoded
    there, and is `out` itself. Raises DamagedSampleError for damaged pixels.
    """
    height, width, turn = header
    try:
        if out is not None and turn == 1 and out.shape == (channels, height, width):
            simplejpeg.decode_jpeg(data, COLOURSPACES[channels], buffer=out.transpose(1, 2, 0))
            return out
        scale = 1
        if at_least is not None:
            scale = _scale(height, width, at_least[::-1] if turn in TRANSPOSED else at_least)
        pixels = simplejpeg.decode_jpeg(
            data,
            COLOURSPACES[channels],
            min_height=0 if scale == 1 else -(-height // scale),
            min_width=0 if scale == 1 else -(-width // scale),
        )
    except ValueError as error:
        if str(error).startswith(WRONG_PIXELS) and not PADDING.match(str(error)):
            raise DamagedSampleError(f"damaged JPEG ({error})") from None
        return None
    return upright(pixels, turn).transpose(2, 0, 1)


def _scale(height: int, width: int, needed: tuple[int, int]) -> int:
    """The largest of 1, 2, 4, 8 that leaves twice the needed pixels on both sides."""
    for scale in (8, 4, 2):
        if height >= 2 * needed[0] * scale and width >= 2 * needed[1] * scale:
            return scale
    return 1


def upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """(H, W, C) as it is meant to be seen, after EXIF orientation `turn` (1: as it is)."""
    if turn in TRANSPOSED:
        pixels = pixels.transpose(1, 0, 2)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def orientation(data: bytes | memoryview) -> int:
    """1 to 8 from the EXIF record of a JPEG; 1 where there is none or it is damaged."""
    exif = _exif(data)
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, at)
        for entry in range(count):
            tag, kind = struct.unpack_from(order + "HH", exif, at + 2 + 12 * entry)
            if tag == ORIENTATION_TAG and kind == SHORT:
                (turn,) = struct.unpack_from(order + "H", exif, at + 2 + 12 * entry + 8)
                return turn if 1 <= turn <= 8 else 1
    except struct.error:
        pass
    return 1


def _exif(data: bytes | memoryview) -> bytes:
    """What follows the mark of the EXIF record; nothing where there is none.

    The record belongs in front, among the segments of applications. Behind them it is looked for
    too, up to the pixels: a search through those would take as long as all else that is done with
    the file before it is decoded.
    """
    at = 2
    while len(data) > at + 4 and data[at] == 0xFF and data[at + 1] in SEGMENTS_IN_FRONT:
        if data[at + 4 : at + 10] == EXIF_MARK:
            return bytes(data[at + 10 : at + 10 + MAX_SEGMENT])
        at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    head = bytes(data[at : at + SHORT_HEAD])
    pixels = head.find(START_OF_SCAN)
    if pixels < 0:
        head = bytes(data[at : at + MAX_SEGMENT])
        pixels = head.find(START_OF_SCAN)
    start = head.find(EXIF_MARK, 0, pixels if pixels >= 0 else len(head))
    return b"" if start < 0 else head[start + 6 :]
