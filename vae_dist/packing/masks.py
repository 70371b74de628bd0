"""Which pixels of a packed picture are observed, after its resizing.

In: a .mask.png, as upright and as large as its picture (white: observed). Out: a .mask.png of the
size in the shard. A pixel is observed where all pixels that Pillow's bicubic filter takes it from
are: min-pooling, so that no value of a missing one leaks into what counts.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from vae_dist.data.decode import decode_image
from vae_dist.data.tar import DamagedSampleError

Box = tuple[float, float, float, float]  # left, upper, right, lower, as Pillow has them


def prepare_mask(
    data: bytes, have: tuple[int, int], want: tuple[int, int], box: Box, *, max_pixels: int
) -> bytes:
    """have, want: (H, W) of the picture in source and shard; box: what of it was resized.

    Kept byte for byte where the picture's size is. Raises DamagedSampleError.
    """
    try:
        shades = decode_image("png", data, channels=1, max_pixels=max_pixels)[0]  # (H, W)
    except DamagedSampleError as error:
        raise DamagedSampleError(f"its mask: {error}") from None
    if shades.shape != have:
        raise DamagedSampleError(
            f"its mask is {shades.shape[0]} x {shades.shape[1]} pixels, but the picture "
            f"{have[0]} x {have[1]}"
        )
    if have == want:
        return data
    file = io.BytesIO()
    Image.fromarray(255 * resized(shades > 127, want, box).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def resized(observed: np.ndarray, size: tuple[int, int], box: Box) -> np.ndarray:
    """bool (H, W) of `size`, from bool (H, W) of the picture that was resized from `box`."""
    height, width = observed.shape
    missing = np.pad(np.cumsum(np.cumsum(~observed, 0), 1), ((1, 0), (1, 0)))
    top, bottom = _sources(height, box[1], box[3], size[0])
    left, right = _sources(width, box[0], box[2], size[1])
    rows = missing[bottom] - missing[top]
    return rows[:, right] == rows[:, left]


def _sources(have: int, low: float, high: float, want: int) -> tuple[np.ndarray, np.ndarray]:
    """First source and one past the last of each of `want` pixels (precompute_coeffs of Pillow)."""
    if (low, high) == (0, have) and have == want:
        return np.arange(want), np.arange(want) + 1  # Pillow leaves such an axis alone
    start, stop = np.float32(low), np.float32(high)  # as Pillow hands them on
    scale = float(stop - start) / want
    support = 2.0 * max(scale, 1.0)
    center = float(start) + (np.arange(want) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    return first, np.minimum((center + support + 0.5).astype(np.int64), have)
