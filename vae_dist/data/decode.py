"""From the files of one sample to an image, by an allow-list: nothing is unpickled.

In: a webdataset sample, `{"__key__": ..., "png": bytes, ...}`. Out: image (C, H, W), upright, uint8
(bits=16: uint16; bits=32: float32 in [-1, 1]); a file of another depth is refused.

JPEG is decoded by simplejpeg, everything else and what simplejpeg does not take by Pillow; TIFF by
tifffile, 16-bit colour PNG by imagecodecs (extra `science`: Pillow would narrow it to 8 bits);
`.npy` by numpy, arrays (H, W) or (C, H, W) without objects.
Grey becomes colour and colour grey; an alpha channel without transparent pixels is dropped, and is
kept where `channels` is 2 or 4, which needs one. What would lose something is refused by name.

Which pixels are observed may be said by the sample: by its `.mask.png` (white: observed; none: all
are), by its alpha channel (from half opaque on) or by floats that are NaN where nothing was seen.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from vae_dist.data.arrays import ARRAYS, array_size, decode_array
from vae_dist.data.jpeg import (
    ORIENTATION_TAG,
    TRANSPOSED,
    JpegHeader,
    jpeg_header,
    orientation,
    read_jpeg,
    upright,
)
from vae_dist.data.pixels import PIXEL_TYPES, check_channels, check_pixels, other_depth, short
from vae_dist.data.tar import DamagedSampleError

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}  # by last extension
JPEG = ("jpg", "jpeg")
SUFFIXES = (*FORMATS, *ARRAYS)
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's name of an image with that many channels
CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
NUM_NAMED = 5  # files of a sample that one message names
GREY_PNG = 0  # colour type
MAGIC = (  # first bytes of a file, and the suffix that they speak for
    (PNG_SIGNATURE, "png"),
    (b"\xff\xd8\xff", "jpg"),
    (b"\x93NUMPY", "npy"),
    *((mark, "tif") for mark in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    *((b"P%d" % kind, "ppm") for kind in range(1, 7)),
    (b"\0\0\0\x0cjP  ", "jp2"),
)
BRANDS = {b"avif": "avif", b"avis": "avif"}  # of files that begin with a box ftyp
FOREIGN = (
    (rb"\s*<(!doctype|html|\?xml)", "a web page, no image; fetch it again"),
    (rb"version https://git-lfs", "a Git LFS pointer, no image; run `git lfs pull`"),
    (rb".{4}ftyp(hei|mif|msf)", "HEIC, which is not decoded; convert it to JPEG"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL, which is not decoded; convert it to PNG"),
)
MASK_MEMBER = "mask.png"
MASKS_OF_SAMPLES = ("member", "alpha", "nan")


def decode_sample(sample: Mapping[str, Any], **wanted: Any) -> np.ndarray:
    """The image that `prepare_sample` prepares."""
    return prepare_sample(sample, **wanted)()


def prepare_sample(
    sample: Mapping[str, Any],
    *,
    channels: int,
    max_pixels: int,
    bits: int = 8,
    at_least: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
    mask: str = "none",
) -> Callable[[], np.ndarray]:
    """What decodes the image (channels, H, W); with a mask of MASKS_OF_SAMPLES (channels + 1, H,
    W), the last plane of which is 1 where the pixel was observed, else 0. The header of a JPEG is
    read here, so that little is left to do between the pixels of two images.

    at_least: (H, W) that the caller shrinks the image to; a JPEG may then be decoded at 1/2, 1/4
    or 1/8 of its size, as long as twice that many pixels are left.
    out: (channels, H, W), in memory as (H, W, channels): an image of that size may be decoded
    there and be `out` itself; what was in it is lost also where decoding fails.
    Raises DamagedSampleError, with the reason, for what cannot or must not be decoded; so does
    what is returned.
    """
    if mask != "member" and MASK_MEMBER in sample:
        raise DamagedSampleError("its .mask.png says what is missing: set data.mask=member")
    if mask in MASKS_OF_SAMPLES:
        return partial(_with_mask, sample, mask, channels, bits=bits, max_pixels=max_pixels)
    suffix, data = image_of(sample)
    if suffix in JPEG and channels in (1, 3) and bits not in (16, 32):
        header = jpeg_header(data, max_pixels=max_pixels)
        if header is not None:
            return partial(_read_jpeg, data, header, channels, max_pixels, at_least, out)
    return partial(
        decode_image,
        suffix,
        data,
        channels=channels,
        max_pixels=max_pixels,
        bits=bits,
        at_least=at_least,
    )


def _read_jpeg(
    data: bytes,
    header: JpegHeader,
    channels: int,
    max_pixels: int,
    at_least: tuple[int, int] | None,
    out: np.ndarray | None,
) -> np.ndarray:
    pixels = read_jpeg(data, header, channels, at_least=at_least, out=out)
    if pixels is None:
        return _decode_by_pillow(data, "JPEG", channels, max_pixels, at_least)
    return pixels


def _with_mask(
    sample: Mapping[str, Any], kind: str, channels: int, *, bits: int, max_pixels: int
) -> np.ndarray:
    """Image and mask, (channels + 1, H, W), at their stored size."""
    suffix, data = image_of(sample)
    if kind == "nan":
        if suffix not in ARRAYS:
            raise DamagedSampleError(f"a .{suffix} holds no NaN; data.mask=nan reads .npy and TIFF")
        pixels = decode_array(
            suffix, data, max_pixels=max_pixels, bits=bits, missing=True, channels=channels
        )
        pixels = _with_channels(pixels, channels)
        observed = ~np.isnan(pixels).any(0)
        pixels = np.where(observed, pixels, 0.0)
    elif kind == "alpha" and suffix not in JPEG:
        pixels = decode_image(
            suffix, data, channels=channels + 1, max_pixels=max_pixels, bits=bits, opaque=True
        )
        observed = pixels[-1] > np.iinfo(pixels.dtype).max // 2
        pixels = pixels[:-1]
    else:
        pixels = decode_image(suffix, data, channels=channels, max_pixels=max_pixels, bits=bits)
        observed = decode_mask(sample, pixels.shape[1:], max_pixels=max_pixels)
    return np.concatenate([pixels, observed[None].astype(PIXEL_TYPES[bits])])


def decode_mask(sample: Mapping[str, Any], size: tuple[int, ...], *, max_pixels: int) -> np.ndarray:
    """Which pixels of an image of that size (H, W) its `.mask.png` calls observed, bool (H, W); all
    where it has none. Raises DamagedSampleError."""
    if MASK_MEMBER not in sample:
        return np.ones(size, bool)
    shades = decode_image("png", sample[MASK_MEMBER], channels=1, max_pixels=max_pixels)
    observed = shades[0] > 127
    if observed.shape != size:
        raise DamagedSampleError(
            f"its mask is {observed.shape[0]} x {observed.shape[1]} pixels, but the image "
            f"{size[0]} x {size[1]}"
        )
    return observed


def size_of_sample(sample: Mapping[str, Any], *, max_pixels: int) -> tuple[int, int]:
    """(H, W) of the upright image after its header alone. Raises DamagedSampleError."""
    suffix, data = image_of(sample)
    if suffix in ARRAYS:
        return array_size(suffix, data, max_pixels=max_pixels)
    if suffix in JPEG and (header := jpeg_header(data, max_pixels=max_pixels)) is not None:
        return header.upright_size
    image = _opened(data, FORMATS[suffix], max_pixels)
    turn = orientation(data) if suffix in JPEG else _orientation_of(image)
    size = image.height, image.width
    return size[::-1] if turn in TRANSPOSED else size


def image_of(sample: Mapping[str, Any]) -> tuple[str, bytes]:
    """Suffix and bytes of the one image of a sample."""
    names = [name for name in sample if name.rpartition(".")[2] in SUFFIXES and name != MASK_MEMBER]
    if len(names) != 1:
        found = ", ".join(names[:NUM_NAMED]) or "no ." + ", .".join(SUFFIXES)
        if len(names) > NUM_NAMED:
            found += f" and {len(names) - NUM_NAMED} more (a dot in a key joins samples)"
        raise DamagedSampleError(f"a sample has one image, this one has {found}")
    data = sample[names[0]]
    kind = kind_of(data)
    return kind if kind in SUFFIXES else names[0].rpartition(".")[2], data


def kind_of(data: bytes | memoryview) -> str | None:
    """The suffix that the first bytes of an image file speak for: suffixes lie. None: no image."""
    head = bytes(data[:16])
    if head[:4] == b"RIFF":
        return "webp" if head[8:12] == b"WEBP" else None
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12])
    return next((suffix for magic, suffix in MAGIC if head.startswith(magic)), None)


def foreign(data: bytes | memoryview) -> str | None:
    """What a file is that is often found in the place of an image, and what to do."""
    head = bytes(data[:64])
    return next((text for start, text in FOREIGN if re.match(start, head, re.I | re.S)), None)


def decode_image(
    suffix: str,
    data: bytes,
    *,
    channels: int,
    max_pixels: int,
    bits: int = 8,
    at_least: tuple[int, int] | None = None,
    opaque: bool = False,
) -> np.ndarray:
    """One file of an allowed suffix as (channels, H, W) of the type of `bits`.

    opaque: 8-bit files without the alpha channel that `channels` asks for count as opaque.
    Raises DamagedSampleError.
    """
    if suffix in ARRAYS:
        pixels = decode_array(suffix, data, max_pixels=max_pixels, bits=bits, channels=channels)
        return _with_channels(pixels, channels)
    if bits in (16, 32):
        if bits == 32 or suffix != "png" or not is_png16(data):
            raise DamagedSampleError(other_depth(f"a .{suffix} of 8 bits a channel", bits))
        pixels = decode_png16(data, max_pixels=max_pixels)
        if len(pixels) == channels + 1 and (pixels[channels] == 65535).all():
            pixels = pixels[:channels]  # an alpha channel that says nothing
        return _with_channels(pixels, channels)
    if suffix in JPEG and channels in (1, 3):
        header = jpeg_header(data, max_pixels=max_pixels)
        if header is not None:
            return _read_jpeg(data, header, channels, max_pixels, at_least, None)
    return _decode_by_pillow(data, FORMATS[suffix], channels, max_pixels, at_least, opaque)


def decode_own(suffix: str, data: bytes, *, max_pixels: int) -> np.ndarray:
    """An image with the channels and the depth that it has, (C, H, W), decoded in full; floats may
    be NaN where a pixel is missing. Raises DamagedSampleError."""
    if suffix in ARRAYS:
        return decode_array(suffix, data, max_pixels=max_pixels, bits=None, missing=True)
    if suffix == "png" and is_png16(data):
        return decode_png16(data, max_pixels=max_pixels)
    image = open_by_pillow(data, FORMATS[suffix], max_pixels)
    channels = 1 if image.mode in ("1", "L") else 4 if has_alpha(image) else 3
    return decode_image(suffix, data, channels=channels, max_pixels=max_pixels)


def has_alpha(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("LA", "PA", "RGBA")


def _opened(data: bytes, image_format: str, max_pixels: int) -> Image.Image:
    """The image before its pixels are decoded, of any mode. Raises DamagedSampleError."""
    try:
        image = Image.open(io.BytesIO(data), formats=(image_format,))
    except Exception as error:  # Pillow raises many kinds on damaged bytes
        reason = foreign(data) or f"no readable {image_format} ({short(error)})"
        raise DamagedSampleError(reason) from None
    check_pixels(image.height, image.width, max_pixels)
    return image


def open_by_pillow(data: bytes, image_format: str, max_pixels: int) -> Image.Image:
    """An image of 8 bits a channel before its pixels are decoded. Raises DamagedSampleError."""
    image = _opened(data, image_format, max_pixels)
    # Pillow narrows 16-bit colour to 8 bits without a word
    if image.mode.startswith("I") or image.mode == "F" or (image_format == "PNG" and data[24] > 8):
        raise DamagedSampleError(
            "more than 8 bits a channel: set data.bits=16, or convert it to 8 bits"
        )
    if image.mode not in CONVERTIBLE:
        raise DamagedSampleError(f"images of mode {image.mode} cannot be read; convert it to RGB")
    if image_format == "PNG":
        _check_png(data)
    return image


def _check_png(data: bytes) -> None:
    """Compare the checksums of all chunks: Pillow leaves out those of the pixels. Raises
    DamagedSampleError."""
    view, at = memoryview(data), len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        checksum = view[at + 8 + length : at + 12 + length]
        if len(checksum) < 4:
            raise DamagedSampleError("damaged PNG (it is cut off)")
        if zlib.crc32(view[at + 4 : at + 8 + length]) != int.from_bytes(checksum, "big"):
            raise DamagedSampleError(f"damaged PNG (checksum of the {ascii(name)[2:-1]} chunk)")
        if name == b"IEND":
            return
        at += 12 + length


def _decode_by_pillow(
    data: bytes,
    image_format: str,
    channels: int,
    max_pixels: int,
    at_least: tuple[int, int] | None,
    opaque: bool = False,
) -> np.ndarray:
    image = open_by_pillow(data, image_format, max_pixels)
    if channels not in MODES:
        raise DamagedSampleError(f"a {image_format} has no {channels} channels; use .npy or .tif")
    if MODES[channels].endswith("A") and not (opaque or has_alpha(image)):
        raise DamagedSampleError(f"no alpha channel, which data.channels={channels} asks for")
    turn = orientation(data) if image_format == "JPEG" else _orientation_of(image)
    try:
        if at_least is not None:
            height, width = at_least[::-1] if turn in TRANSPOSED else at_least
            image.draft(MODES[channels], (2 * width, 2 * height))
        pixels = np.asarray(_converted(image, MODES[channels]))
    except DamagedSampleError:
        raise
    except Exception as error:
        raise DamagedSampleError(f"damaged {image_format} ({short(error)})") from None
    pixels = upright(pixels.reshape(*pixels.shape[:2], channels), turn)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in another mode; alpha is dropped only where it says nothing."""
    if image.mode == mode and "transparency" not in image.info:
        return image
    if has_alpha(image) and mode in ("L", "RGB"):
        image = image.convert("RGBA")
        if image.getchannel("A").histogram()[255] < image.width * image.height:
            raise DamagedSampleError(
                "transparent pixels; pack the images with background=white or black, or set "
                "data.channels=4"
            )
    return image.convert(mode)


def _orientation_of(image: Image.Image) -> int:
    """1 to 8 from the EXIF record, 1 where there is none. Raises DamagedSampleError."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception as error:
        raise DamagedSampleError(f"damaged EXIF record ({short(error)})") from None


def is_png16(data: bytes) -> bool:
    """Whether the header of a PNG names 16 bits a channel."""
    return len(data) > 25 and bytes(data[:8]) == PNG_SIGNATURE and data[24] == 16


def decode_png16(data: bytes, *, max_pixels: int) -> np.ndarray:
    """A 16-bit PNG as uint16 (C, H, W), with as many channels as it has.

    Raises DamagedSampleError.
    """
    image = _opened(data, "PNG", max_pixels)
    _check_png(data)
    turn = _orientation_of(image)
    try:
        if data[25] == GREY_PNG:
            pixels = np.asarray(image)[:, :, None]
        else:
            pixels = _imagecodecs().png_decode(data)
    except DamagedSampleError:
        raise
    except Exception as error:  # both raise many kinds on damaged bytes
        raise DamagedSampleError(f"damaged PNG ({short(error)})") from None
    if pixels.dtype != np.uint16 or pixels.ndim != 3:
        raise DamagedSampleError(f"damaged PNG ({pixels.dtype} of shape {pixels.shape})")
    return np.ascontiguousarray(upright(pixels, turn).transpose(2, 0, 1))


def _imagecodecs() -> Any:
    try:
        import imagecodecs
    except ImportError:
        raise DamagedSampleError(
            "16-bit colour PNG needs imagecodecs: pip install 'vae_dist[science]', or store "
            ".npy arrays"
        ) from None
    return imagecodecs


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """(C, H, W) with the wanted C: repeated from grey, otherwise it must be there."""
    if len(pixels) == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=0)
    check_channels(len(pixels), channels)
    return np.ascontiguousarray(pixels)
