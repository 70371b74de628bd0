"""What the decoders of all formats share: the types of pixels, and the words of refusals."""

from __future__ import annotations

from typing import Any

import numpy as np

from vae_dist.data.tar import DamagedSampleError

PIXEL_TYPES: dict[int, np.dtype[Any]] = {  # by data.bits; what is cut to 5 bits is stored as 8
    5: np.dtype(np.uint8),
    8: np.dtype(np.uint8),
    16: np.dtype(np.uint16),
    32: np.dtype(np.float32),
}


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Refuse an image by its header, before memory is taken. Raises DamagedSampleError."""
    if width * height > max_pixels:
        raise DamagedSampleError(
            f"{width} x {height} pixels are more than data.max_pixels={max_pixels}"
        )


def check_channels(found: int, channels: int) -> None:
    if found != channels and (found, channels) != (1, 3):
        raise DamagedSampleError(f"{found} channels, but data.channels={channels}")


def other_depth(found: str, bits: int) -> str:
    wanted = {16: "uint16", 32: "floating-point"}.get(bits, "uint8")
    return f"{found}, but data.bits={bits} reads {wanted} values"


def short(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0].split(" <_io")[0][:100]
