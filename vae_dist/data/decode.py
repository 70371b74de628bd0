"""From the files of one sample to an image, by an allow-list: nothing is unpickled.

In: a webdataset sample, `{"__key__": ..., "png": bytes, ...}`, and what is asked (`ImageSettings`).
Out: image (C, H, W), upright, uint8 (bits=16: uint16; bits=32: float32 in [-1, 1]); a file of
another depth is refused. What is damaged is decided here, whatever is asked, and all that a library
raises is damage.

What a file holds decides, not its suffix. JPEG is decoded by simplejpeg, everything else and what
simplejpeg does not take by Pillow; TIFF by tifffile, 16-bit colour PNG by imagecodecs (extra
`science`: Pillow would narrow it to 8 bits); `.npy` by numpy, arrays (H, W) or (C, H, W).
Grey becomes colour and colour grey. An alpha channel is dropped where no pixel is transparent or
`background` says what is behind them, and kept where `channels` is 2 or 4, which needs one. What
would lose something is refused by name.

Which pixels are observed may be said by the sample: by its `.mask.png` (white: observed; none: all
are), by its alpha channel (from half opaque on) or by floats that are NaN where nothing was seen.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from vae_dist.data.arrays import (
    ARRAYS,
    array_size,
    check_channels,
    check_depth,
    decode_array,
    from_science,
)
from vae_dist.data.formats import (
    PNG_SIGNATURE,
    TRANSPOSED,
    check_pixels,
    check_png,
    decode_jpeg,
    is_png16,
    jpeg_header,
    orientation,
    upright,
    values_of_png,
)
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import PIXEL_TYPES, ImageSettings

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}  # by last extension
SUFFIXES = (*FORMATS, *ARRAYS)
CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # modes of Pillow
GROUNDS = {"white": 1, "black": 0}  # data.background
NUM_NAMED = 5  # files of a sample that one message names
MAGIC = (  # first bytes of a file, and the suffix that they speak for
    (b"\xff\xd8\xff", "jpg"),
    (PNG_SIGNATURE, "png"),
    (b"\x93NUMPY", "npy"),
    *((mark, "tif") for mark in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    *((b"P%d" % kind, "ppm") for kind in range(1, 7)),
    (b"\0\0\0\x0cjP  ", "jp2"),
)
FOREIGN = (
    (rb"$", "an empty file"),
    (rb"\s*<(!doctype|html|\?xml)", "a web page, no image; fetch it again"),
    (rb"version https://git-lfs", "a Git LFS pointer, no image; run `git lfs pull`"),
    (rb".{4}ftyp(hei|mif|msf)", "HEIC, which is not decoded; convert it to JPEG"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL, which is not decoded; convert it to PNG"),
)
MASK_MEMBER = "mask.png"
MASKS_OF_SAMPLES = ("member", "alpha", "nan")


def decode_sample(
    sample: Mapping[str, Any],
    settings: ImageSettings | None = None,
    *,
    at_least: tuple[int, int] | None = None,
    **fields: Any,
) -> np.ndarray:
    """The image (channels, H, W); with a mask of MASKS_OF_SAMPLES (channels + 1, H, W), the last
    plane of which is 1 where the pixel was observed, else 0.

    fields: of ImageSettings, where none are given, as channels=3, max_pixels=10**6.
    at_least: (H, W) that the caller shrinks the image to; a JPEG may then be decoded at 1/2, 1/4
    or 1/8 of its size, as long as twice that many pixels are left.
    Raises DamagedSampleError, with the reason, for what cannot or must not be decoded.
    """
    settings = settings or ImageSettings(size=(0, 0), resize=False, **fields)
    if settings.mask != "member" and MASK_MEMBER in sample:
        raise DamagedSampleError("its .mask.png says what is missing: set data.mask=member")
    kind, data = image_of(sample, settings.image_key)
    if settings.mask in MASKS_OF_SAMPLES:
        return _with_mask(sample, kind, data, settings)
    return _decode(kind, data, settings, at_least=at_least)


def decode_own(suffix: str, data: bytes, *, max_pixels: int) -> np.ndarray:
    """An image with the channels and the depth that it has, (C, H, W), decoded in full; floats may
    be NaN where a pixel is missing. Raises DamagedSampleError."""
    return decode_sample({suffix: data}, channels=0, bits=0, max_pixels=max_pixels)


def size_of_sample(
    sample: Mapping[str, Any], *, max_pixels: int, image_key: str = ""
) -> tuple[int, int]:
    """(H, W) of the upright image after its header alone. Raises DamagedSampleError."""
    kind, data = image_of(sample, image_key)
    with damage_named(kind):
        if kind in ARRAYS:
            return array_size(kind, data, max_pixels)
        if kind == "jpg" and (header := jpeg_header(data, max_pixels)) is not None:
            height, width, _, turn = header
        else:
            image = _opened(data, FORMATS[kind], max_pixels)
            height, width, turn = image.height, image.width, orientation(image.info)
        return (width, height) if turn in TRANSPOSED else (height, width)


def decode_mask(sample: Mapping[str, Any], size: tuple[int, ...], *, max_pixels: int) -> np.ndarray:
    """Which pixels of an image of that size (H, W) its `.mask.png` calls observed, bool (H, W); all
    where it has none. Raises DamagedSampleError."""
    if MASK_MEMBER not in sample:
        return np.ones(size, bool)
    shades = decode_sample({"png": sample[MASK_MEMBER]}, channels=1, max_pixels=max_pixels)
    observed = shades[0] > 127
    if observed.shape != size:
        raise DamagedSampleError(
            f"its mask is {observed.shape[0]} x {observed.shape[1]} pixels, but the image "
            f"{size[0]} x {size[1]}"
        )
    return observed


def image_of(sample: Mapping[str, Any], image_key: str = "") -> tuple[str, bytes]:
    """Kind (a suffix) and bytes of the image of a sample: of the member `image_key`, or of the one
    image, beside which others may lie under suffixes with a dot. Raises DamagedSampleError."""
    names = [name for name in sample if name.rpartition(".")[2] in SUFFIXES and name != MASK_MEMBER]
    if image_key:
        names = [image_key] if image_key in sample else []
    elif len(names) > 1:
        names = [name for name in names if "." not in name] or names
    if len(names) != 1:
        found = ", ".join(names[:NUM_NAMED]) or f"no .{image_key or ', .'.join(SUFFIXES)}"
        if len(names) > NUM_NAMED:
            found += f" and {len(names) - NUM_NAMED} more (a dot in a key joins samples)"
        elif names:
            found += f"; choose with data.image_key={names[0]}"
        raise DamagedSampleError(f"a sample has one image, this one has {found}")
    data = bytes(sample[names[0]])
    kind = kind_of(data)
    if kind not in SUFFIXES:
        is_named = f"no readable {FORMATS.get(names[0].rpartition('.')[2], '.' + names[0])}"
        raise DamagedSampleError(foreign(data) or (f"a .{kind}, convert it" if kind else is_named))
    return kind, data


def kind_of(data: bytes | memoryview) -> str | None:
    """The suffix that the first bytes of an image file speak for: suffixes lie. None: no image."""
    head = bytes(data[:16])
    for magic, suffix in MAGIC:
        if head.startswith(magic):
            return suffix
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return "avif" if head[4:12] in (b"ftypavif", b"ftypavis") else None


def foreign(data: bytes | memoryview) -> str | None:
    """What a file is that is often found in the place of an image, and what to do."""
    head = bytes(data[:64])
    return next((text for start, text in FOREIGN if re.match(start, head, re.I | re.S)), None)


def has_alpha(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("LA", "PA", "RGBA")


def open_by_pillow(data: bytes, image_format: str, max_pixels: int) -> Image.Image:
    """An image of 8 bits a channel before its pixels are decoded. Raises DamagedSampleError."""
    with damage_named(image_format):
        image = _opened(data, image_format, max_pixels)
    if image.mode.startswith("I") or image.mode == "F":
        raise DamagedSampleError(
            "more than 8 bits a channel: set data.bits=16, or convert it to 8 bits"
        )
    if image.mode not in CONVERTIBLE:
        raise DamagedSampleError(f"images of mode {image.mode} cannot be read; convert it to RGB")
    return image


def _opened(data: bytes, image_format: str, max_pixels: int) -> Image.Image:
    """The image of any mode before its pixels are decoded."""
    image = Image.open(io.BytesIO(data), formats=(image_format,))
    check_pixels(image.height, image.width, max_pixels)
    return image


@contextlib.contextmanager
def damage_named(kind: str) -> Iterator[None]:
    """Raises DamagedSampleError for all that decoders raise: many kinds, on damaged bytes."""
    try:
        yield
    except DamagedSampleError:
        raise
    except Exception as error:
        words = (str(error) or type(error).__name__).split("\n")[0].split(" <_io")[0][:100]
        is_unknown = isinstance(error, UnidentifiedImageError)
        what = f"{'no readable' if is_unknown else 'damaged'} {FORMATS.get(kind, kind)}"
        raise DamagedSampleError(f"{what} ({words})") from None


def _decode(
    kind: str,
    data: bytes,
    settings: ImageSettings,
    *,
    at_least: tuple[int, int] | None = None,
    opaque: bool = False,
) -> np.ndarray:
    """The image as it is asked for; opaque: without an alpha channel it counts as opaque."""
    with damage_named(kind):
        if kind in ARRAYS:
            pixels = decode_array(kind, data, settings)
            check_channels(len(pixels), settings.channels)
            grey_to_colour = len(pixels) == 1 and settings.channels == 3
            return np.repeat(pixels, 3, 0) if grey_to_colour else pixels
        if kind == "jpg" and settings.channels in (0, 1, 3) and settings.bits in (0, 5, 8):
            limit = settings.max_pixels
            found = decode_jpeg(data, settings.channels, max_pixels=limit, at_least=at_least)
            if found is not None:
                return found
        pixels, turn = _by_pillow(kind, data, settings)
        return upright(_with_channels(pixels, settings, opaque), turn).transpose(2, 0, 1)


def _with_mask(
    sample: Mapping[str, Any], kind: str, data: bytes, settings: ImageSettings
) -> np.ndarray:
    """Image and mask, (channels + 1, H, W), at their stored size."""
    if settings.mask == "nan":
        if kind not in ARRAYS:
            raise DamagedSampleError(f"a .{kind} holds no NaN; data.mask=nan reads .npy and TIFF")
        pixels = _decode(kind, data, settings)
        observed = ~np.isnan(pixels).any(0)
        pixels = np.where(observed, pixels, 0.0)
    elif settings.mask == "alpha" and kind != "jpg":
        wanted = replace(settings, channels=settings.channels + 1)
        pixels = _decode(kind, data, wanted, opaque=True)
        observed = pixels[-1] > np.iinfo(pixels.dtype).max // 2
        pixels = pixels[:-1]
    else:
        pixels = _decode(kind, data, settings)
        observed = decode_mask(sample, pixels.shape[1:], max_pixels=settings.max_pixels)
    return np.concatenate([pixels, observed[None].astype(pixels.dtype)])


def _by_pillow(kind: str, data: bytes, settings: ImageSettings) -> tuple[np.ndarray, int]:
    """Grey or colour, (H, W, C), uint8 or uint16, perhaps with alpha; and the orientation."""
    is_deep = kind == "png" and is_png16(data)
    check_depth(kind, PIXEL_TYPES[16 if is_deep else 8], settings.bits)
    image = (_opened if is_deep else open_by_pillow)(data, FORMATS[kind], settings.max_pixels)
    turn = orientation(image.info)
    if kind == "png":
        check_png(data, image)
    if is_deep and values_of_png(data) > 1:
        pixels = from_science("imagecodecs").png_decode(data)
    elif is_deep:
        pixels = np.asarray(image)
    elif has_alpha(image):
        pixels = np.asarray(image.convert("LA" if image.mode in ("L", "LA") else "RGBA"))
    else:
        is_grey = settings.channels == 1 or image.mode in ("1", "L")
        pixels = np.asarray(image.convert("L" if is_grey else "RGB"))
    return pixels.reshape(image.height, image.width, -1), turn


def _with_channels(pixels: np.ndarray, settings: ImageSettings, opaque: bool) -> np.ndarray:
    """(H, W, C) of a picture with the channels that are asked for."""
    have, want = pixels.shape[2], settings.channels or pixels.shape[2]
    if have == want:
        return pixels
    top = np.iinfo(pixels.dtype).max
    colours, alpha = pixels, np.full_like(pixels[:, :, :1], top)
    if have in (2, 4):
        colours, alpha = pixels[:, :, :-1], pixels[:, :, -1:]
    elif want in (2, 4) and not opaque:
        raise DamagedSampleError(f"no alpha channel, which data.channels={want} asks for")
    if want not in (2, 4) and (alpha < top).any():
        if settings.background == "none":
            raise DamagedSampleError(
                "transparent pixels; set data.background=white or black, or data.channels=4"
            )
        weight, ground = alpha.astype(np.uint32), top * GROUNDS[settings.background]
        mixed = colours * weight + ground * (top - weight)
        colours = ((mixed + top // 2) // top).astype(pixels.dtype)
    if want > 2 and colours.shape[2] == 1:
        colours = np.repeat(colours, 3, 2)
    elif want < 3 and colours.shape[2] == 3:  # luma as Pillow weighs it
        weights = np.array((19595, 38470, 7471), np.uint32)
        luma = (colours.astype(np.uint32) * weights).sum(2, np.uint32, keepdims=True)
        colours = (luma + 0x8000 >> 16).astype(pixels.dtype)
    check_channels(colours.shape[2] + (want in (2, 4)), want)
    return np.concatenate([colours, alpha], 2) if want in (2, 4) else colours


def note_of(sample: Mapping[str, Any], image_key: str = "") -> str:
    """What a user wants to know of an image that is read otherwise than it looks; empty: nothing.
    Raises DamagedSampleError."""
    kind, data = image_of(sample, image_key)
    if kind in ARRAYS:
        return ""
    with damage_named(kind):
        image = Image.open(io.BytesIO(data), formats=(FORMATS[kind],))
        if getattr(image, "is_animated", False):
            return "it is animated, its first frame is taken"
        if other_profile(image):
            return "its colours are not sRGB and taken as if they were; `pack` converts them"
        return ""


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
