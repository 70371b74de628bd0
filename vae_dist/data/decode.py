"""From the files of one sample to an image and a label, by an allow-list: nothing is unpickled.

In: a webdataset sample, `{"__key__": ..., "png": bytes, "cls": b"7", ...}`.
Out: uint8 image (C, H, W) and an integer label, -1 where there is none.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vae_dist.data.tar import DamagedSampleError

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}  # by last extension
MODES = {1: "L", 3: "RGB"}  # Pillow's name of an image with that many channels
CONVERTIBLE = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
NO_LABEL = -1


def decode_sample(
    sample: Mapping[str, Any],
    *,
    channels: int,
    max_pixels: int,
    at_least: tuple[int, int] | None = None,
) -> tuple[np.ndarray, int]:
    """Image uint8 (channels, H, W) and label.

    at_least: (H, W) that the caller shrinks the image to; a JPEG may then be decoded at 1/2, 1/4
    or 1/8 of its size, as long as twice that many pixels are left.
    Raises DamagedSampleError, with the reason, for what cannot or must not be decoded.
    """
    names = [name for name in sample if name.rpartition(".")[2] in FORMATS]
    if len(names) != 1:
        found = ", ".join(names) or "no .png, .jpg, .jpeg or .webp"
        raise DamagedSampleError(f"a sample has one image, this one has {found}")
    image_format = FORMATS[names[0].rpartition(".")[2]]
    image = _decode_image(sample[names[0]], image_format, channels, max_pixels, at_least)
    return image, _label(sample)


def _label(sample: Mapping[str, Any]) -> int:
    text = sample.get("cls")
    if text is None:
        return NO_LABEL
    try:
        label = int(text)
    except ValueError:
        raise DamagedSampleError(f".cls is no integer: {text[:20]!r}") from None
    if abs(label) >= 2**63:
        raise DamagedSampleError(f".cls is no integer of 64 bits: {text[:20]!r}")
    return label


def _decode_image(
    data: bytes,
    image_format: str,
    channels: int,
    max_pixels: int,
    at_least: tuple[int, int] | None,
) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=(image_format,))
    except Exception as error:  # Pillow raises many kinds on damaged bytes
        raise DamagedSampleError(f"no readable {image_format} ({_short(error)})") from None
    width, height = image.size
    if width * height > max_pixels:
        raise DamagedSampleError(
            f"{width} x {height} pixels are more than data.max_pixels={max_pixels}"
        )
    _refuse_what_would_change(image, data, image_format)
    mode = MODES[channels]
    try:
        if at_least is not None:
            image.draft(mode, (2 * at_least[1], 2 * at_least[0]))
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except Exception as error:
        raise DamagedSampleError(f"damaged {image_format} ({_short(error)})") from None
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _refuse_what_would_change(image: Image.Image, data: bytes, image_format: str) -> None:
    """Pillow narrows 16-bit colour to 8 bits without a word, and alpha has no one meaning."""
    if image.mode.startswith("I") or image.mode == "F" or (image_format == "PNG" and data[24] > 8):
        raise DamagedSampleError("more than 8 bits a channel; convert it to 8 bits")
    if image.mode not in CONVERTIBLE or "transparency" in image.info:
        raise DamagedSampleError(f"mode {image.mode} with transparency; flatten it before packing")


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0].split(" <_io")[0][:100]
