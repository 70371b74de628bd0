"""Which pixels of an image are observed: masks uint8 (1, H, W), 1 where one is.

A mask comes with the sample (`data.mask` = member, alpha, nan; the decoder reads it) and goes
through resizing, crop and mirror with its image, or is drawn at the size that the model sees:

    random      each pixel is missing with probability `fraction`, on its own
    rectangle   one rectangle of that part of the pixels is missing, of any place and of an aspect
                up to 2:1 (less elongated where it would not fit)
    half        the left, right, upper or lower half is missing, each as often

A drawn mask is a function of (seed, epoch, sample), in evaluation of the sample alone.
"""

from __future__ import annotations

import math

import numpy as np

from vae_dist.randomness import numpy_generator

DRAWN = ("random", "rectangle", "half")
MAX_ASPECT = 2.0


def draw_mask(
    kind: str, size: tuple[int, int], fraction: float, *, seed: int, epoch: int, sample: int
) -> np.ndarray:
    """One of the kinds `DRAWN`, for an image of (H, W) pixels."""
    generator = numpy_generator(seed, "mask", epoch, sample)
    if kind == "random":
        return (generator.random((1, *size)) >= fraction).astype(np.uint8)
    mask = np.ones((1, *size), np.uint8)
    draw = _half if kind == "half" else _rectangle
    top, bottom, left, right = draw(size, fraction, generator)
    mask[:, top:bottom, left:right] = 0
    return mask


def _half(
    size: tuple[int, int], fraction: float, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    height, width = size
    middle = height // 2, width // 2
    side = int(generator.integers(4))
    return (
        (0, height, 0, middle[1]),
        (0, height, middle[1], width),
        (0, middle[0], 0, width),
        (middle[0], height, 0, width),
    )[side]


def _rectangle(
    size: tuple[int, int], fraction: float, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Rows and columns of area fraction * H * W, to rounding."""
    root = math.sqrt(fraction)
    steepest = min(MAX_ASPECT, 1 / fraction) if fraction else 1.0  # neither side beyond the image
    stretch = steepest ** (generator.random() - 0.5)  # (h / H) / (w / W) is its square
    height = round(min(1.0, root * stretch) * size[0])
    width = round(min(1.0, root / stretch) * size[1])
    top = int(generator.integers(size[0] - height + 1))
    left = int(generator.integers(size[1] - width + 1))
    return top, top + height, left, left + width


def resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask of an image (1, H, W) that was resized by torch's antialiased bicubic filter.

    A pixel is observed where all pixels that the filter takes it from are: min-pooling, so that no
    value of a missing one leaks into what counts.
    """
    if mask.shape[1:] == size:
        return mask
    missing = np.pad(np.cumsum(np.cumsum(1 - mask[0].astype(np.int64), 0), 1), ((1, 0), (1, 0)))
    top, bottom = _sources(mask.shape[1], size[0])
    left, right = _sources(mask.shape[2], size[1])
    rows, columns = missing[bottom] - missing[top], (left, right)
    count = rows[:, columns[1]] - rows[:, columns[0]]  # missing sources of each pixel
    return (count == 0).astype(np.uint8)[None]


def _sources(have: int, want: int) -> tuple[np.ndarray, np.ndarray]:
    """First source and one past the last of each of `want` pixels, as torch's filter has them."""
    scale = have / want
    support = 2.0 * max(scale, 1.0)
    center = scale * (np.arange(want) + 0.5)
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((center + support + 0.5).astype(np.int64), have)
    return first, stop
