"""One picture on its way into a shard: kept byte for byte, or decoded, brought to size, encoded.

In: suffix and bytes. Out: suffix and bytes that the trainer reads, checked by decoding them.
A picture is kept when the trainer reads it as it is and neither size nor format asks for more.
Arrays (.npy, TIFF) and 16-bit PNG are kept always: what would change them is refused. Floats may be
NaN where a pixel is missing; a mask goes through the same resizing and crop as its picture.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from vae_dist.config.commands import PackCommand
from vae_dist.data.decode import (
    ARRAYS,
    MASK_MEMBER,
    decode_mask,
    decode_own,
    foreign,
    has_alpha,
    is_png16,
    kind_of,
    open_by_pillow,
    other_profile,
)
from vae_dist.data.jpeg import dct_scale, orientation
from vae_dist.data.tar import DamagedSampleError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")  # of Pillow
SUFFIX_OF = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # of what a shard holds
LOSSY = ("JPEG", "WEBP")
TURNS = {  # by orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Box = tuple[float, float, float, float]  # left, upper, right, lower, as Pillow has them


class Picture(NamedTuple):
    suffix: str
    data: bytes
    shape: tuple[int, int, int]  # C, H, W
    kept: bool  # byte for byte
    mask: bytes | None = None  # PNG of as many pixels
    note: str = ""  # what a user wants to know of it


def prepare(
    suffix: str, data: bytes, command: PackCommand, *, mask: bytes | None = None
) -> Picture:
    """The picture as it goes into the shard, and the .mask.png that came with it.

    Of the keys of `pack`, size, format, quality, background and max_pixels are followed. Raises
    DamagedSampleError, with the reason.
    """
    kind = kind_of(data)
    if kind is None:
        named = foreign(data) or (f"no readable {suffix.upper()}" if data else "an empty file")
        raise DamagedSampleError(named)
    if kind in ARRAYS or is_png16(data):
        if command.size or command.format not in ("keep", kind):
            name = "16-bit PNG" if kind == "png" else f".{kind}"
            raise DamagedSampleError(f"{name} is kept as it is; leave size and format away")
        shape = _shape(kind, data, command.max_pixels)
        picture, have = Picture(kind, data, shape, True), shape[1:]
    else:
        # with a mask it is decoded in full, then resized: blocks of a reduced JPEG would leak
        picture, have = _prepared(kind, data, command, exact=mask is not None)
    if mask is not None:
        picture = picture._replace(mask=_prepare_mask(mask, have, picture.shape[1:], command))
    return picture


def _prepared(
    kind: str, data: bytes, command: PackCommand, *, exact: bool
) -> tuple[Picture, tuple[int, int]]:
    """The picture, and its (H, W) in the source, upright."""
    image_format = Image.registered_extensions().get(f".{kind}", "")
    if image_format not in FORMATS:
        raise DamagedSampleError(f"a .{kind} is not decoded; convert it to PNG")
    image = open_by_pillow(data, image_format, command.max_pixels)
    stored, profile = SUFFIX_OF.get(image_format), other_profile(image)
    background = command.background if has_alpha(image) else "none"
    note = "the colours are converted to sRGB" if profile else ""
    if getattr(image, "is_animated", False):
        note = "animated; its first frame is taken"
    shape = (3, image.height, image.width)
    if stored is not None:  # whatever becomes of it: what is damaged is decided in one place
        shape = _shape(stored, data, command.max_pixels)
    have = shape[1:]
    is_kept = (
        stored is not None
        and command.format in ("keep", stored)
        and _target(*have, command.size) == have
        and background == "none"
        and profile is None
    )
    if stored is not None and is_kept:
        return Picture(stored, data, shape, True, note=note), have
    target = Image.registered_extensions().get(f".{command.format}")
    target = target or ("JPEG" if image_format in LOSSY else "PNG")
    try:
        if command.size and image_format == "JPEG" and not exact:
            longest = command.size if isinstance(command.size, int) else max(command.size)
            scale = dct_scale(image.height, image.width, (longest, longest))
            image.draft(None, (image.width // scale, image.height // scale))
        if (turn := TURNS.get(orientation(image.info))) is not None:
            image = image.transpose(turn)
        image = _converted(image, background, profile, target)
        image = _resized(image, command.size)
        file = io.BytesIO()
        options: dict[str, Any] = {"quality": command.quality} if target in LOSSY else {}
        image.save(file, target, **options)
    except DamagedSampleError:
        raise
    except Exception as error:  # Pillow raises many kinds on damaged bytes
        text = (str(error) or type(error).__name__).split("\n")[0][:100]
        raise DamagedSampleError(f"damaged {image_format} ({text})") from None
    shape = (len(image.getbands()), image.height, image.width)
    return Picture(SUFFIX_OF[target], file.getvalue(), shape, False, note=note), have


def _converted(
    image: Image.Image, background: str, profile: ImageCms.ImageCmsProfile | None, target: str
) -> Image.Image:
    """Upright image as L, RGB or RGBA, in sRGB and on the background."""
    if profile is not None:
        srgb = ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, profile, srgb) or image
        image.info.pop("icc_profile", None)
    if not has_alpha(image):
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    if background != "none":
        ground = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    if target == "JPEG":
        raise DamagedSampleError("transparent pixels; set background=white or black")
    return image.convert("RGBA")


def _shape(suffix: str, data: bytes, max_pixels: int) -> tuple[int, int, int]:
    """C, H, W of a picture that is decoded in full. Raises DamagedSampleError."""
    channels, height, width = decode_own(suffix, data, max_pixels=max_pixels).shape
    return channels, height, width


def _target(height: int, width: int, size: Any) -> tuple[int, int]:
    """(H, W) of the picture in the shard; a shorter side is never enlarged."""
    if not isinstance(size, int):
        return size[0], size[1]
    scale = size / min(height, width)
    if not 0 < scale < 1:
        return height, width
    return max(size, round(height * scale)), max(size, round(width * scale))


def _resized(image: Image.Image, size: Any) -> Image.Image:
    height, width = _target(image.height, image.width, size)
    if (height, width) == (image.height, image.width):
        return image
    box = _box(image.height, image.width, size)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def _box(height: int, width: int, size: Any) -> Box:
    """What of a picture is resized: all of it, or the middle of the shape of [H, W]."""
    if isinstance(size, int):
        return (0, 0, width, height)
    wanted = size[1] / size[0]
    crop_width, crop_height = float(width), float(height)
    if width / height > wanted:
        crop_width = wanted * height
    elif width / height < wanted:
        crop_height = width / wanted
    left, top = (width - crop_width) * 0.5, (height - crop_height) * 0.5
    return (left, top, left + crop_width, top + crop_height)


# which pixels are observed, after the resizing


def _prepare_mask(
    data: bytes, have: tuple[int, int], want: tuple[int, int], command: PackCommand
) -> bytes:
    """have, want: (H, W) of the picture in source and shard. Kept byte for byte where they are the
    same. Raises DamagedSampleError."""
    try:
        observed = decode_mask({MASK_MEMBER: data}, have, max_pixels=command.max_pixels)
    except DamagedSampleError as error:
        raise DamagedSampleError(f"its .{MASK_MEMBER}: {error}") from None
    if have == want:
        return data
    left, top, right, bottom = _box(*have, command.size)
    missing = np.pad(np.cumsum(np.cumsum(~observed, 0), 1), ((1, 0), (1, 0)))
    first, last = _sources(have[0], top, bottom, want[0])
    rows = missing[last] - missing[first]
    first, last = _sources(have[1], left, right, want[1])
    observed = rows[:, last] == rows[:, first]
    file = io.BytesIO()
    Image.fromarray(255 * observed.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


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


def thumbnail(suffix: str, data: bytes, pixels: int) -> np.ndarray:
    """uint8 (pixels, pixels, 3) for a contact sheet; grey where nothing can be drawn.

    Of wider levels the first channel, stretched to its own range; missing ones are black.
    """
    try:
        levels = decode_own(suffix, data, max_pixels=2**26)
        if levels.dtype != np.uint8:
            first = levels[:1].astype(np.float32)
            seen = first[~np.isnan(first)]
            low, high = float(seen.min()), float(seen.max())
            first = np.nan_to_num(first, nan=low)
            levels = (255 * (first - low) / max(high - low, 1e-6)).astype(np.uint8)
        colours = levels[:3] if len(levels) > 2 else np.repeat(levels[:1], 3, axis=0)
        image = Image.fromarray(np.ascontiguousarray(colours.transpose(1, 2, 0)))
        return np.asarray(ImageOps.fit(image, (pixels, pixels), Image.Resampling.BICUBIC))
    except Exception:
        return np.full((pixels, pixels, 3), 128, np.uint8)
