"""JPEG by simplejpeg (libjpeg-turbo), about twice as fast as Pillow.

In: the bytes of a JPEG. Out: uint8 (H, W, C), upright after its EXIF orientation; or None where
Pillow must decide: simplejpeg is not installed, CMYK, or bytes that it calls damaged.

libjpeg can decode at k/8 of the size. Only 1/2, 1/4 and 1/8 are used: the other scales are slower
and round the grid up, so that a resize afterwards stretches the picture.
"""

from __future__ import annotations

import struct

import numpy as np

from vae_dist.data.tar import DamagedSampleError

try:
    import simplejpeg
except ImportError:  # no wheel for this machine: Pillow decodes
    simplejpeg = None

COLOURSPACES = {1: "GRAY", 3: "RGB"}
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
ORIENTATION_TAG = 0x0112
SHORT = 3  # TIFF type: 16 bits


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
    Raises DamagedSampleError when the header names more than max_pixels.
    """
    if simplejpeg is None:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > max_pixels:
            raise DamagedSampleError(
                f"{width} x {height} pixels are more than data.max_pixels={max_pixels}"
            )
        if space == "CMYK":
            return None
        turn = orientation(data)
        scale = 1
        if at_least is not None:
            needed = at_least[::-1] if turn in TRANSPOSED else at_least
            scale = _scale(height, width, needed)
        fits = room is not None and scale == 1 and room.shape == (height, width, channels)
        pixels = simplejpeg.decode_jpeg(
            data,
            COLOURSPACES[channels],
            min_height=0 if scale == 1 else -(-height // scale),
            min_width=0 if scale == 1 else -(-width // scale),
            buffer=room if fits and turn == 1 else None,
        )
    except DamagedSampleError:
        raise
    except ValueError:
        return None
    return upright(pixels, turn)


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


def orientation(data: bytes) -> int:
    """1 to 8 from the EXIF record of a JPEG; 1 where there is none or it is damaged."""
    start = data.find(b"Exif\0\0", 0, 1 << 16)
    if start < 0:
        return 1
    exif = data[start + 6 : start + 6 + (1 << 16)]
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
