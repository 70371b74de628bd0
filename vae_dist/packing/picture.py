"""One picture on its way into a shard: kept byte for byte, or decoded, brought to size, encoded.

In: suffix and bytes. Out: suffix and bytes that the trainer reads, checked by decoding them.
A picture is kept when the trainer reads it as it is and neither size nor format asks for more.
Arrays (.npy, TIFF) and 16-bit PNG are kept always: what would change them is refused. Floats may be
NaN where a pixel is missing; a mask goes through the same resizing and crop as its picture.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from vae_dist.data.decode import (
    ARRAYS,
    decode_image,
    decode_own,
    foreign,
    has_alpha,
    is_png16,
    kind_of,
    open_by_pillow,
)
from vae_dist.data.tar import DamagedSampleError

FORMAT_OF = {
    "png": "PNG",
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "webp": "WEBP",
    "bmp": "BMP",
    "gif": "GIF",
    "ppm": "PPM",
    "pgm": "PPM",
    "avif": "AVIF",
    "jp2": "JPEG2000",
}
SUFFIX_OF = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
Box = tuple[float, float, float, float]  # left, upper, right, lower, as Pillow has them
LOSSY = ("JPEG", "WEBP")


@dataclass(frozen=True)
class PictureSettings:
    """What `pack` does to pictures."""

    size: int | tuple[int, int] | None = None  # shorter side, or (H, W) cropped from the centre
    format: Literal["keep", "png", "jpg", "webp"] = "keep"
    quality: int = 95
    background: Literal["none", "white", "black"] = "none"
    max_pixels: int = 2**26


class Picture(NamedTuple):
    suffix: str
    data: bytes
    shape: tuple[int, int, int]  # C, H, W
    kept: bool  # byte for byte
    mask: bytes | None = None  # PNG of as many pixels
    note: str = ""  # what a user wants to know of it


def prepare(
    suffix: str, data: bytes, settings: PictureSettings, *, mask: bytes | None = None
) -> Picture:
    """The picture as it goes into the shard, and the .mask.png that came with it.

    Raises DamagedSampleError, with the reason.
    """
    if not data:
        raise DamagedSampleError("an empty file")
    picture, have = _prepared(suffix, data, settings, exact=mask is not None)
    if mask is None:
        return picture
    box = _box(*have, settings.size)
    max_pixels = settings.max_pixels
    mask = prepare_mask(mask, have, picture.shape[1:], box, max_pixels=max_pixels)
    return picture._replace(mask=mask)


def _prepared(
    suffix: str, data: bytes, settings: PictureSettings, *, exact: bool
) -> tuple[Picture, tuple[int, int]]:
    """The picture, and its (H, W) in the source, upright. exact: decoded in full, then resized."""
    kind = kind_of(data) or suffix
    if kind in ARRAYS or is_png16(data):
        picture = _raw(kind, data, settings)
        return picture, picture.shape[1:]
    image_format = FORMAT_OF.get(kind, "")
    if not image_format:
        raise DamagedSampleError(foreign(data) or f"a .{kind} is not decoded; convert it to PNG")
    image = open_by_pillow(data, image_format, settings.max_pixels)
    transparent = has_alpha(image)
    stored = SUFFIX_OF.get(image_format)
    profile = other_profile(image)
    note = "the colours are converted to sRGB" if profile else ""
    if getattr(image, "is_animated", False):
        note = "animated; its first frame is taken"
    channels, height, width = 3, image.height, image.width
    if stored is not None:  # whatever becomes of it: what is damaged is decided in one place
        channels, height, width = decode_own(stored, data, max_pixels=settings.max_pixels).shape
    keep = (
        settings.format in ("keep", stored)
        and stored is not None
        and _target(height, width, settings.size) == (height, width)
        and not (transparent and settings.background != "none")
        and profile is None
    )
    if keep:
        assert stored is not None
        return Picture(stored, data, (channels, height, width), True, note=note), (height, width)
    changed = _changed(image, image_format, settings, transparent, profile, exact=exact)
    return changed._replace(note=note), (height, width)


def other_profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The profile of colours that are none of sRGB."""
    data = image.info.get("icc_profile")
    if not data or image.mode not in ("RGB", "RGBA"):
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        is_srgb = "srgb" in ImageCms.getProfileDescription(profile).lower()
        is_rgb = profile.profile.xcolor_space.strip() == "RGB"
    except (OSError, ImageCms.PyCMSError):
        return None  # a damaged profile says nothing
    return profile if is_rgb and not is_srgb else None


def _raw(suffix: str, data: bytes, settings: PictureSettings) -> Picture:
    if settings.size is not None or settings.format not in ("keep", suffix):
        name = "16-bit PNG" if suffix == "png" else f".{suffix}"
        raise DamagedSampleError(f"{name} is kept as it is; leave size and format away")
    channels, height, width = decode_own(suffix, data, max_pixels=settings.max_pixels).shape
    return Picture(suffix, data, (channels, height, width), True)


def _target(height: int, width: int, size: Any) -> tuple[int, int]:
    """(H, W) of the picture in the shard; a shorter side is never enlarged."""
    if size is None:
        return height, width
    if not isinstance(size, int):
        return size
    scale = size / min(height, width)
    if scale >= 1:
        return height, width
    return max(size, round(height * scale)), max(size, round(width * scale))


def _changed(
    image: Image.Image,
    image_format: str,
    settings: PictureSettings,
    transparent: bool,
    profile: ImageCms.ImageCmsProfile | None,
    *,
    exact: bool,
) -> Picture:
    target_format = FORMAT_OF.get(settings.format, "JPEG" if image_format in LOSSY else "PNG")
    try:
        if settings.size is not None and image_format == "JPEG" and not exact:
            shorter = settings.size if isinstance(settings.size, int) else max(settings.size)
            image.draft(None, (2 * shorter, 2 * shorter))
        image = ImageOps.exif_transpose(image)
        if profile is not None:
            srgb = ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, profile, srgb) or image
            image.info.pop("icc_profile", None)
        if transparent and settings.background != "none":
            ground = Image.new("RGBA", image.size, settings.background)
            image = Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
        elif transparent:
            if target_format == "JPEG":
                raise DamagedSampleError("transparent pixels; set background=white or black")
            image = image.convert("RGBA")
        else:
            image = image.convert("L" if image.mode in ("1", "L") else "RGB")
        image = _resized(image, settings.size)
        file = io.BytesIO()
        options: dict[str, Any] = {"quality": settings.quality} if target_format in LOSSY else {}
        image.save(file, target_format, **options)
    except DamagedSampleError:
        raise
    except Exception as error:  # Pillow raises many kinds on damaged bytes
        text = (str(error) or type(error).__name__).split("\n")[0][:100]
        raise DamagedSampleError(f"damaged {image_format} ({text})") from None
    shape = (len(image.getbands()), image.height, image.width)
    return Picture(SUFFIX_OF[target_format], file.getvalue(), shape, False)


def _resized(image: Image.Image, size: int | tuple[int, int] | None) -> Image.Image:
    height, width = _target(image.height, image.width, size)
    if (height, width) == (image.height, image.width):
        return image
    box = _box(image.height, image.width, size)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def _box(height: int, width: int, size: int | tuple[int, int] | None) -> Box:
    """What of a picture is resized: all of it, or the middle of the shape of [H, W]."""
    if not isinstance(size, tuple):
        return (0, 0, width, height)
    wanted = size[1] / size[0]
    crop_width: float = width
    crop_height: float = height
    if width / height > wanted:
        crop_width = wanted * height
    elif width / height < wanted:
        crop_height = width / wanted
    left, top = (width - crop_width) * 0.5, (height - crop_height) * 0.5
    return (left, top, left + crop_width, top + crop_height)


# which pixels are observed, after the resizing


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


# contact sheets


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
