"""Images that are arrays: `.npy` by numpy, without objects, and TIFF by tifffile.

In: the bytes of a file. Out: (C, H, W), upright, of the stored type, with as many channels as it
has. Headers are judged before pixels are unpacked.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from vae_dist.data.jpeg import ORIENTATION_TAG, TRANSPOSED, upright
from vae_dist.data.pixels import PIXEL_TYPES, check_channels, check_pixels, other_depth, short
from vae_dist.data.tar import DamagedSampleError

ARRAYS = ("npy", "tif", "tiff")  # any number of channels, none converted
MAX_NPY_HEADER = 10_000  # bytes
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, YCBCR = 0, 1, 2, 6  # PhotometricInterpretation of TIFF
TIFF_JPEG = 7  # Compression
VALUES_PER_PIXEL = (
    4  # of a TIFF, times max_pixels, where its header does not say how many channels it has
)


def decode_array(
    suffix: str,
    data: bytes,
    *,
    max_pixels: int,
    bits: int | None = 8,
    missing: bool = False,
    channels: int | None = None,
) -> np.ndarray:
    """A .npy or TIFF as (C, H, W) of the type of `bits` (None: the one that it has), with as many
    channels as it has; floats of any width become float32, and may be NaN where `missing` is
    true. Raises DamagedSampleError.

    channels: how many the caller takes; a TIFF that has others is refused by its header.
    """
    if suffix == "npy":
        pixels = _decode_npy(data, max_pixels)
    else:
        pixels = _decode_tiff(data, max_pixels, channels)
    is_float = pixels.dtype.kind == "f"
    depth = 32 if is_float else 8 * pixels.dtype.itemsize
    if pixels.dtype.kind not in "uf" or depth not in PIXEL_TYPES:
        kind = "floating-point" if bits == 32 else "uint8, uint16 and floating-point"
        raise DamagedSampleError(f"a .{suffix} of {pixels.dtype}; only {kind} values are images")
    if bits is not None and depth != (8 if bits == 5 else bits):
        raise DamagedSampleError(other_depth(f"a .{suffix} of {pixels.dtype}", bits))
    pixels = pixels.astype(PIXEL_TYPES[depth], copy=False)
    if is_float:
        inside = np.abs(pixels) <= 1  # false for NaN
        if not (inside | np.isnan(pixels) if missing else inside).all():
            low, high = pixels.min(), pixels.max()
            raise DamagedSampleError(
                f"values from {low:g} to {high:g}; float images lie in [-1, 1]"
            )
    return pixels


def array_size(suffix: str, data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """(H, W) of the upright image after its header alone. Raises DamagedSampleError."""
    if suffix == "npy":
        shape, _, _, _ = _npy_header(data, max_pixels)
        return shape[-2], shape[-1]
    with _opened_tiff(data) as tiff:
        _, height, width = _tiff_shape(tiff, max_pixels)
        is_turned = _tiff_orientation(tiff) in TRANSPOSED
    return (width, height) if is_turned else (height, width)


def _npy_header(data: bytes, max_pixels: int) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether it lies by column, type, and where the pixels begin."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, by_column, kind = read(file, max_header_size=MAX_NPY_HEADER)
    except Exception as error:  # numpy parses the header as Python, with many kinds of errors
        raise DamagedSampleError(f"no readable .npy ({short(error)})") from None
    if kind.hasobject or kind.kind not in "uf":
        raise DamagedSampleError(
            f".npy of {kind}; only uint8, uint16 and floating-point arrays are images"
        )
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise DamagedSampleError(f".npy of shape {shape}; images are (H, W) or (C, H, W)")
    check_pixels(shape[-2], shape[-1], max_pixels)
    return shape, by_column, kind, file.tell()


def _decode_npy(data: bytes, max_pixels: int) -> np.ndarray:
    """(C, H, W) as it is stored; the header is believed only if the bytes are there."""
    shape, by_column, kind, start = _npy_header(data, max_pixels)
    count = int(np.prod(shape, dtype=object))
    if len(data) - start != count * kind.itemsize:
        raise DamagedSampleError(
            f"the .npy is cut off: {len(data) - start} of {count * kind.itemsize} bytes of pixels"
        )
    pixels = np.frombuffer(data, kind, count, offset=start)
    pixels = pixels.reshape(shape, order="F" if by_column else "C")
    return pixels[None] if len(shape) == 2 else pixels


def _decode_tiff(data: bytes, max_pixels: int, channels: int | None) -> np.ndarray:
    """(C, H, W), upright, of the stored type; the headers are judged first, as a few bytes may
    unpack to any number of pages."""
    with _opened_tiff(data) as tiff:
        shape = _tiff_shape(tiff, max_pixels)
        if channels is not None:
            check_channels(shape[0], channels)
        elif math.prod(shape) > VALUES_PER_PIXEL * max_pixels:
            raise DamagedSampleError(
                f"{shape[0]} x {shape[1]} x {shape[2]} values are more than {VALUES_PER_PIXEL} x "
                f"data.max_pixels={max_pixels}"
            )
        pixels = tiff.series[0].asarray()
        if tiff.series[0].axes.endswith("S"):
            pixels = pixels.reshape(*shape[1:], shape[0])
        else:
            pixels = pixels.reshape(shape).transpose(1, 2, 0)
        if tiff.pages[0].photometric == WHITE_IS_ZERO:
            pixels = (1 << tiff.pages[0].bitspersample) - 1 - pixels
        if (bits := tiff.pages[0].bitspersample) < 8:
            pixels = (pixels * (255 // ((1 << bits) - 1))).astype(np.uint8)
        return upright(pixels, _tiff_orientation(tiff)).transpose(2, 0, 1)


@contextlib.contextmanager
def _opened_tiff(data: bytes) -> Iterator[Any]:
    try:
        import tifffile
    except ImportError:
        raise DamagedSampleError(
            "TIFF images need tifffile: pip install 'vae_dist[science]'"
        ) from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            yield tiff
    except DamagedSampleError:
        raise
    except Exception as error:  # tifffile raises many kinds on damaged bytes
        raise DamagedSampleError(f"damaged TIFF ({short(error)})") from None


def _tiff_shape(tiff: Any, max_pixels: int) -> tuple[int, int, int]:
    """C, H, W as they are stored, after the headers. Raises DamagedSampleError for what is no image
    or has more pixels."""
    shape, axes = tuple(map(int, tiff.series[0].shape)), tiff.series[0].axes
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise DamagedSampleError(f"TIFF of shape {shape}; one image a file")
    if len(shape) == 2:
        shape = (1, *shape)
    elif axes.endswith("S"):
        shape = (shape[2], *shape[:2])
    check_pixels(shape[1], shape[2], max_pixels)
    _check_colours(tiff.pages[0])
    return shape[0], shape[1], shape[2]


def _check_colours(page: Any) -> None:
    """Refuse a TIFF whose values are no grey, colour or measured channels. Raises
    DamagedSampleError."""
    kind, is_jpeg = int(page.photometric), int(page.compression) == TIFF_JPEG
    of_integers = page.dtype is not None and page.dtype.kind == "u"
    readable = (
        kind in (BLACK_IS_ZERO, RGB)
        or (kind == WHITE_IS_ZERO and of_integers and page.samplesperpixel == 1)
        or (kind == YCBCR and is_jpeg)  # its decoder makes RGB of it
    )
    if not readable:
        name = getattr(page.photometric, "name", kind)
        raise DamagedSampleError(
            f"a TIFF of PhotometricInterpretation {name} is not read; store it as grey or RGB"
        )
    if page.bitspersample not in (1, 2, 4, 8, 16, 32, 64):  # tifffile leaves 12 bits in uint16
        raise DamagedSampleError(
            f"a TIFF of {page.bitspersample} bits is not read; store it with 8 or 16"
        )


def _tiff_orientation(tiff: Any) -> int:
    """1 to 8 from its tag, 1 where there is none."""
    tag = tiff.pages[0].tags.get(ORIENTATION_TAG)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1
