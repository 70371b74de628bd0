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

import numpy as np

from vae_dist.data.pixels import check_pixels
from vae_dist.data.tar import DamagedSampleError

try:
    import simplejpeg
except ImportError:  # no wheel for this machine: Pillow decodes
    simplejpeg = None

COLOURSPACES = {1: "GRAY", 3: "RGB"}
PLAIN_SPACES = ("Gray", "RGB", "YCbCr")  # as simplejpeg calls them
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


def decode_jpeg(
    data: bytes,
    channels: int,
    *,
    max_pixels: int,
    at_least: tuple[int, int] | None,
    room: np.ndarray | None = None,
) -> np.ndarray | None:
    """uint8 (H, W, channels), channels 1 or 3, or None: let Pillow try.

    room: (H, W, C) in one piece; an upright image of that size is decoded there.
    Raises DamagedSampleError when the header names more than max_pixels, and for damaged pixels.
    """
    if simplejpeg is None:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_pixels(height, width, max_pixels)
    if space == "CMYK":
        return None
    turn = orientation(data)
    scale = 1
    if at_least is not None:
        needed = at_least[::-1] if turn in TRANSPOSED else at_least
        scale = _scale(height, width, needed)
    fits = room is not None and scale == 1 and room.shape == (height, width, channels)
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            COLOURSPACES[channels],
            min_height=0 if scale == 1 else -(-height // scale),
            min_width=0 if scale == 1 else -(-width // scale),
            buffer=room if fits and turn == 1 else None,
        )
    except ValueError as error:
        if str(error).startswith(WRONG_PIXELS) and not PADDING.match(str(error)):
            raise DamagedSampleError(f"damaged JPEG ({error})") from None
        return None
    return upright(pixels, turn)


def is_plain_jpeg(data: bytes | memoryview, channels: int, size: tuple[int, int]) -> bool:
    """Whether these bytes are, after their header, an upright image of that size (H, W), which
    `decode_into` can decode in place."""
    if simplejpeg is None or channels not in COLOURSPACES:
        return False
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    return (height, width) == size and space in PLAIN_SPACES and orientation(data) == 1


def decode_into(data: bytes | memoryview, room: np.ndarray) -> bool:
    """Decode a plain JPEG in `room`, uint8 (H, W, C) in one piece; False: `decode_jpeg` says why
    not, or decodes it after all."""
    try:
        simplejpeg.decode_jpeg(data, COLOURSPACES[room.shape[2]], buffer=room)
    except ValueError:
        return False
    return True


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(H, W) of the upright image after its header; None: let Pillow try."""
    if simplejpeg is None:
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if orientation(data) in TRANSPOSED else (height, width)


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
