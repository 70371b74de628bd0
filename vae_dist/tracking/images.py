"""Pictures for people: grids of images and of inputs above their reconstructions, as PNG files.

What goes in: images (N, C, H, W), or a list of images (C, H, W) of several sizes, uint8, uint16 or
float in [-1, 1]. What comes out: a Pillow image, mode L or RGB: grey for C = 1, for two channels
the first as magenta and the second as green, else the first three as red, green and blue. Small
images are enlarged by a whole factor, pixel by pixel, so that 28 x 28 digits can be seen and no
pixel is blended with its neighbour.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vae_dist.files import write_durably
from vae_dist.tracking.metrics import format_number

Images = torch.Tensor | Sequence[torch.Tensor]

_CELL_PIXELS = 96  # enlarged images stay within this many pixels a side
_LINE_PIXELS = 2  # between neighbours
_PAIR_PIXELS = 10  # between a row of reconstructions and the next row of inputs
_LINE_GREY = 112  # differs from the black and the white ground of digits
_FILE_NAME = re.compile(r"(?P<name>.+)_(?P<step>\d{8,15})\.png")


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] or uint16 to the nearest of 256 levels; uint8 as it is."""
    if images.dtype == torch.uint8:
        return images
    if images.dtype == torch.uint16:
        return ((images.int() + 128) // 257).to(torch.uint8)
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def with_holes(images: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
    """uint8 images (N, C, H, W) that are grey where the masks (N, 1, H, W) are 0; None: nowhere."""
    return images if masks is None else torch.where(masks > 0, to_uint8(images), _LINE_GREY)


def grid(images: Images, *, columns: int | None = None) -> Image.Image:
    """All images, row by row from the top left, with thin lines between them.

    `columns` is by default the smallest number that makes the grid at least as wide as high.
    """
    cells = _cells(images)
    return _canvas([cells], columns or _square_columns(len(cells)))


def side_by_side(inputs: Images, reconstructions: Images) -> Image.Image:
    """Rows of inputs, each directly above the row of their reconstructions."""
    columns = min(_square_columns(2 * len(inputs)), len(inputs))
    return _canvas([_cells(inputs), _cells(reconstructions)], columns)


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of one mode, a gap between them."""
    size = (left.width + _PAIR_PIXELS + right.width, max(left.height, right.height))
    both = Image.new("L", size, _LINE_GREY).convert(left.mode)
    both.paste(left, (0, 0))
    both.paste(right, (left.width + _PAIR_PIXELS, 0))
    return both


def single(image: torch.Tensor) -> Image.Image:
    """One image (C, H, W) at its own size, pixel for pixel."""
    return _picture(_pixels(image))


def file_name(number: int, key: str) -> str:
    """What a picture of sample `number` is called: what of its key can be in a file name."""
    return f"{number:06d}-{re.sub('[^A-Za-z0-9_-]', '_', key)[:80]}"


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write `image`, whole or not at all; folders are made. OSError when that is impossible."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _write(Path(path), buffer)


def _write(path: Path, buffer: io.BytesIO) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, buffer.getvalue())
    return path


def save_image(image: torch.Tensor, path: Path, *, bits: int) -> None:
    """Write one image (C, H, W), float in [-1, 1], to `path` with the suffix that fits: a PNG where
    that holds all of it, else .npy (C, H, W) of the values that shards of `bits` store."""
    if bits == 8 and image.shape[0] in (1, 3):
        save_png(single(image), f"{path}.png")
        return
    values, buffer = image.float().clamp(-1, 1).numpy(), io.BytesIO()
    if bits < 32:
        kind = np.uint8 if bits == 8 else np.uint16
        values = ((values + 1) * (np.iinfo(kind).max / 2)).round().astype(kind)
    np.save(buffer, values)
    _write(path.with_name(f"{path.name}.npy"), buffer)


def left_out(channels: int, bits: int) -> str:
    """What a picture shows of such images, as a clause; empty where it is all."""
    parts = [f"channels 1 to 3 of {channels}"] * (channels > 3) + [f"8 of {bits} bits"] * (bits > 8)
    return f"; pictures show {' and '.join(parts)}" * bool(parts)


def find_images(folder: Path) -> dict[str, dict[int, Path]]:
    """name -> step -> PNG file NAME_STEP.png, steps ascending."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        if match := _FILE_NAME.fullmatch(path.name):
            found.setdefault(match["name"], {})[int(match["step"])] = path
    return found


def image_caption(step: int, metrics: Mapping[str, Any]) -> str:
    """`step 1500 | 94.12 nats | 0.1732 bits/dim`, with what `metrics` has of it."""
    words = [f"step {step}"]
    for key, unit in (("eval/neg_elbo_nats", "nats"), ("eval/bits_per_dim", "bits/dim")):
        value = metrics.get(key)
        if isinstance(value, int | float) and abs(value) < 1e300:
            words.append(f"{format_number(value)} {unit}")
    return " | ".join(words)


def _square_columns(num_images: int) -> int:
    return math.isqrt(max(0, num_images - 1)) + 1


def _cells(images: Images) -> list[np.ndarray]:
    """Enlarged uint8 (H', W', 1 or 3); smaller images stand in the middle of their cells."""
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    factor = max(1, _CELL_PIXELS // max(height, width))
    cells = []
    for image in images:
        pixels = _pixels(image)
        cell = np.full((height, width, pixels.shape[2]), _LINE_GREY, np.uint8)
        top, left = (height - pixels.shape[0]) // 2, (width - pixels.shape[1]) // 2
        cell[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        cells.append(cell.repeat(factor, axis=0).repeat(factor, axis=1))
    return cells


def _pixels(image: torch.Tensor) -> np.ndarray:
    """uint8 (H, W, 1 or 3) of (C, H, W)."""
    pixels = to_uint8(image.detach().cpu()).permute(1, 2, 0).numpy()
    return pixels[..., [0, 1, 0]] if pixels.shape[-1] == 2 else pixels[..., :3]


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _canvas(kinds: Sequence[list[np.ndarray]], columns: int) -> Image.Image:
    """Row by row the cells of one kind, or of each kind in turn, a larger gap after the last."""
    height, width, channels = kinds[0][0].shape
    last_gap = _LINE_PIXELS if len(kinds) == 1 else _PAIR_PIXELS
    down, right = height + _LINE_PIXELS, width + _LINE_PIXELS
    group = len(kinds) * down - _LINE_PIXELS + last_gap  # pixels of a row of each kind
    num_groups = -(-len(kinds[0]) // columns)
    size = num_groups * group - last_gap + 2 * _LINE_PIXELS, columns * right + _LINE_PIXELS
    canvas = np.full((*size, channels), _LINE_GREY, np.uint8)
    for kind, cells in enumerate(kinds):
        for index, cell in enumerate(cells):
            top = _LINE_PIXELS + index // columns * group + kind * down
            left = _LINE_PIXELS + index % columns * right
            canvas[top : top + height, left : left + width] = cell
    return _picture(canvas)
