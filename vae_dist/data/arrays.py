"""Images that are arrays: `.npy` by numpy, without objects, and TIFF by tifffile.

In: the bytes of a file. Out: (C, H, W), upright, of the stored type, with as many channels as it
has. Headers are judged before pixels are unpacked: a few bytes may claim any number of these. The
channels of a TIFF are samples of its one page, or its pages.
"""

from __future__ import annotations

import importlib
import io
import math
from itertools import islice
from typing import Any

import numpy as np

from vae_dist.data.formats import ORIENTATION_TAG, TRANSPOSED, check_pixels, turn_of, upright
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import PIXEL_TYPES, ImageSettings

ARRAYS = ("npy", "tif", "tiff")  # any number of channels, none converted
MAX_PAGES = 1000  # of a TIFF
VALUES_PER_PIXEL = 4  # times max_pixels, where no setting says how many channels there are
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, YCBCR = 0, 1, 2, 6  # PhotometricInterpretation of TIFF
TIFF_JPEG = 7  # Compression


def decode_array(kind: str, data: bytes, settings: ImageSettings) -> np.ndarray:
    """A .npy or TIFF as (C, H, W), floats of any width as float32. settings.bits, channels: what is
    taken, 0 for any; floats may be NaN with mask=nan or bits=0. Raises DamagedSampleError."""
    pixels = _decode_npy(data, settings) if kind == "npy" else _decode_tiff(data, settings)
    is_float = pixels.dtype.kind == "f"
    check_depth(kind, np.dtype(np.float32) if is_float else pixels.dtype, settings.bits)
    if is_float:
        pixels = pixels.astype(np.float32, copy=False)
        may_lack = settings.mask == "nan" or not settings.bits
        inside = np.abs(pixels) <= 1  # false for NaN
        if not (inside | np.isnan(pixels) if may_lack else inside).all():
            low, high = pixels.min(), pixels.max()
            raise DamagedSampleError(
                f"values from {low:g} to {high:g}; float images lie in [-1, 1]"
            )
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def check_depth(kind: str, found: np.dtype[Any], bits: int) -> None:
    """Refuse values of another type than data.bits reads (0: any). Raises DamagedSampleError."""
    native = found.newbyteorder("=")
    if native not in PIXEL_TYPES.values() or (bits and native != PIXEL_TYPES[bits]):
        reads = f"data.bits={bits} reads {PIXEL_TYPES[bits]}" if bits else "that is no image"
        raise DamagedSampleError(
            f"a .{kind} of {native}, but {reads}; convert it, or set data.bits"
        )


def check_channels(found: int, channels: int) -> None:
    """channels: as they are wanted, 0 for any; grey becomes colour. Raises DamagedSampleError."""
    if channels and found != channels and (found, channels) != (1, 3):
        raise DamagedSampleError(f"{found} channels, but data.channels={channels}")


def array_size(kind: str, data: bytes, max_pixels: int) -> tuple[int, int]:
    """(H, W) of the upright image after its header alone. Raises DamagedSampleError."""
    if kind == "npy":
        shape = _npy_shape(data, max_pixels)
        return shape[-2], shape[-1]
    with _open_tiff(data) as tiff:
        _, height, width = _page_shape(tiff.pages[0], len(data), max_pixels)
        is_turned = _turn_of_page(tiff.pages[0]) in TRANSPOSED
    return (width, height) if is_turned else (height, width)


def _npy_shape(data: bytes, max_pixels: int) -> tuple[int, ...]:
    file = io.BytesIO(data)
    is_first = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.kind not in "uf":
        raise DamagedSampleError(f"a .npy of {dtype}, which is no image")
    is_plain = all(type(n) is int and n > 0 for n in shape)
    if len(shape) not in (2, 3) or not is_plain:
        raise DamagedSampleError(f".npy of shape {shape}; images are (H, W) or (C, H, W)")
    check_pixels(shape[-2], shape[-1], max_pixels)
    if len(data) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise DamagedSampleError("the .npy is cut off, or longer than its header says")
    return shape


def _decode_npy(data: bytes, settings: ImageSettings) -> np.ndarray:
    """(C, H, W) as it is stored."""
    _npy_shape(data, settings.max_pixels)
    pixels: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return pixels[None] if pixels.ndim == 2 else pixels


def from_science(package: str) -> Any:
    """A package of the extra `science`. Raises DamagedSampleError."""
    try:
        return importlib.import_module(package)
    except ImportError:
        hint = "pip install 'vae_dist[science]', or store .npy arrays"
        raise DamagedSampleError(f"it needs {package}: {hint}") from None


def _open_tiff(data: bytes) -> Any:
    return from_science("tifffile").TiffFile(io.BytesIO(data))


def _decode_tiff(data: bytes, settings: ImageSettings) -> np.ndarray:
    with _open_tiff(data) as tiff:
        pages = _pages(tiff, len(data), settings)
        pixels = np.concatenate([_page_pixels(page) for page in pages], 2)
        return upright(pixels, _turn_of_page(pages[0])).transpose(2, 0, 1)


def _pages(tiff: Any, num_bytes: int, settings: ImageSettings) -> list[Any]:
    """The one page of an image, or those of one channel each; never its `series`, which believes
    what descriptions say. Raises DamagedSampleError for other numbers of channels."""
    limit = settings.max_pixels
    channels, height, width = _page_shape(tiff.pages[0], num_bytes, limit)
    # without an end a chain of pages may be a ring
    most = settings.channels or min(VALUES_PER_PIXEL * limit // (height * width), MAX_PAGES)
    pages = list(islice(tiff.pages, most + 1))
    shapes = {_page_shape(page, num_bytes, limit) for page in pages}
    if len(pages) > 1 and shapes != {(1, height, width)}:
        raise DamagedSampleError("a TIFF of several pages; one image a file")
    check_channels(channels * len(pages), settings.channels)
    if channels * len(pages) > most:
        raise DamagedSampleError(f"a TIFF of more than {most} channels of this size")
    return pages


def _page_shape(page: Any, num_bytes: int, max_pixels: int) -> tuple[int, int, int]:
    """C, H, W as they are stored. Raises DamagedSampleError for what is no grey, colour or measured
    channels, has more pixels, or promises more than its file can hold."""
    height, width, channels = page.imagelength, page.imagewidth, page.samplesperpixel
    check_pixels(height, width, max_pixels)
    kind = int(page.photometric)
    readable = (
        kind in (BLACK_IS_ZERO, RGB)
        or (kind == WHITE_IS_ZERO and page.dtype.kind in "ub" and channels == 1)
        or (kind == YCBCR and int(page.compression) == TIFF_JPEG)  # its decoder makes RGB of it
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
    places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    is_whole = math.prod(page.chunked) == len(places) <= num_bytes
    if not is_whole or any(count < 1 or at + count > num_bytes for at, count in places):
        raise DamagedSampleError("damaged TIFF (it is cut off)")
    if math.prod(page.chunks) > VALUES_PER_PIXEL * max_pixels:
        raise DamagedSampleError(f"a TIFF of tiles of {page.chunks} values")
    return channels, height, width


def _page_pixels(page: Any) -> np.ndarray:
    """(H, W, C), of whole bytes, 0 is black."""
    pixels = page.asarray(maxworkers=1)
    if page.axes.startswith("S"):
        pixels = pixels.transpose(1, 2, 0)
    pixels = pixels.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)
    top = (1 << page.bitspersample) - 1
    if page.photometric == WHITE_IS_ZERO:
        pixels = top - pixels
    if page.bitspersample < 8:
        pixels = (pixels * (255 // top)).astype(np.uint8)
    return pixels


def _turn_of_page(page: Any) -> int:
    tag = page.tags.get(ORIENTATION_TAG)
    return turn_of(None if tag is None else tag.value)
