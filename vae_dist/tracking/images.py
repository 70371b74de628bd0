"""Pictures for people: grids of images and of inputs above their reconstructions, as PNG.

What goes in: images (N, C, H, W), uint8 or float in [-1, 1], C = 1 (grey) or 3 (RGB). What comes
out: a Pillow image, mode L or RGB. Small images are enlarged by a whole factor, pixel by pixel, so
that 28 x 28 digits can be seen and no pixel is blended with its neighbour.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vae_dist.files import write_durably

_CELL_PIXELS = 96  # enlarged images stay within this many pixels a side
_LINE_PIXELS = 2  # between neighbours
_PAIR_PIXELS = 10  # between a row of reconstructions and the next row of inputs
_LINE_GREY = 112  # differs from the black and the white ground of digits


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] to the nearest of 256 levels, as uint8; uint8 is returned as it is."""
    if images.dtype == torch.uint8:
        return images
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def enlargement(height: int, width: int) -> int:
    """The whole factor by which a grid enlarges images of this size; 1 from 49 pixels on."""
    return max(1, _CELL_PIXELS // max(height, width))


def grid(images: torch.Tensor, *, columns: int | None = None) -> Image.Image:
    """All images, row by row from the top left, with thin lines between them.

    `columns` is by default the smallest number that makes the grid at least as wide as high.
    Cells that the last row leaves over are empty. ValueError without images or for other C.
    """
    cells = _cells(images)
    columns = columns or _square_columns(len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return _canvas(rows, columns=columns, gaps=[_LINE_PIXELS] * (len(rows) - 1))


def side_by_side(
    inputs: torch.Tensor, reconstructions: torch.Tensor, *, columns: int | None = None
) -> Image.Image:
    """Rows of inputs, each directly above the row of their reconstructions; both (N, C, H, W)."""
    if inputs.shape != reconstructions.shape:
        raise ValueError(
            f"inputs {tuple(inputs.shape)} and reconstructions {tuple(reconstructions.shape)}"
            " differ in shape"
        )
    above, below = _cells(inputs), _cells(reconstructions)
    columns = min(columns or _square_columns(2 * len(above)), len(above))
    rows: list[np.ndarray] = []
    gaps: list[int] = []
    for start in range(0, len(above), columns):
        rows += [above[start : start + columns], below[start : start + columns]]
        gaps += [_LINE_PIXELS, _PAIR_PIXELS]
    return _canvas(rows, columns=columns, gaps=gaps[:-1])


def single(image: torch.Tensor) -> Image.Image:
    """One image (C, H, W) at its own size, pixel for pixel."""
    pixels = to_uint8(image.detach().cpu()).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write `image`, whole or not at all; folders are made. OSError when that is impossible."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_durably(path, buffer.getvalue())
    return path


def _square_columns(num_images: int) -> int:
    columns = 1
    while columns * columns < num_images:
        columns += 1
    return columns


def _cells(images: torch.Tensor) -> np.ndarray:
    """(N, C, H, W) to enlarged uint8 (N, H', W', C)."""
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"a grid needs images (N, 1 or 3, H, W), not {tuple(images.shape)}")
    pixels = to_uint8(images.detach().cpu()).permute(0, 2, 3, 1).numpy()
    factor = enlargement(pixels.shape[1], pixels.shape[2])
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)


def _canvas(rows: list[np.ndarray], *, columns: int, gaps: list[int]) -> Image.Image:
    """Rows of cells (n <= columns, H, W, C) below each other, `gaps` pixels apart."""
    _, height, width, channels = rows[0].shape
    shape = (
        len(rows) * height + sum(gaps) + 2 * _LINE_PIXELS,
        columns * (width + _LINE_PIXELS) + _LINE_PIXELS,
        channels,
    )
    canvas = np.full(shape, _LINE_GREY, np.uint8)
    top = _LINE_PIXELS
    for row, gap in zip(rows, [*gaps, 0], strict=True):
        for index, cell in enumerate(row):
            left = _LINE_PIXELS + index * (width + _LINE_PIXELS)
            canvas[top : top + height, left : left + width] = cell
        top += height + gap
    return Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)
