"""PNG: what Pillow does not look at.

In: the bytes of a file. Out: nothing, or DamagedSampleError.
"""

from __future__ import annotations

import struct
import zlib

from PIL import Image

from vae_dist.data.tar import DamagedSampleError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# first column and row of each pass of an interlaced PNG, and their steps
ADAM7 = ("0088", "4088", "0448", "2044", "0224", "1022", "0112")


def is_png16(data: bytes) -> bool:
    """Whether the header of a PNG names 16 bits a channel."""
    return len(data) > 25 and bytes(data[:8]) == PNG_SIGNATURE and data[24] == 16


def samples_of(data: bytes) -> int:
    """Of a pixel, after the colour type in the header."""
    return {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[data[25]]


def check_png(data: bytes, image: Image.Image) -> None:
    """Decode `image`, which Pillow opened. Raises DamagedSampleError for a wrong checksum and for
    fewer pixels than the header promises."""
    view, at, coded = memoryview(data), len(PNG_SIGNATURE), []
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        checksum = view[at + 8 + length : at + 12 + length]
        if len(checksum) < 4:
            raise DamagedSampleError("damaged PNG (it is cut off)")
        if zlib.crc32(view[at + 4 : at + 8 + length]) != int.from_bytes(checksum, "big"):
            raise DamagedSampleError(f"damaged PNG (checksum of the {ascii(name)[2:-1]} chunk)")
        if name == b"IDAT":
            coded.append(view[at + 8 : at + 8 + length])
        if name == b"IEND":
            break
        at += 12 + length
    image.load()  # what a stream lacks that ends early is black in Pillow
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    if not data[28] and last_row.getbbox(alpha_only=False):
        return
    num_bytes, bits = 0, data[24] * samples_of(data)
    for left, top, right, down in (map(int, one) for one in (ADAM7 if data[28] else ("0011",))):
        columns, rows = -((left - image.width) // right), -((top - image.height) // down)
        num_bytes += rows * (1 + -(-columns * bits // 8)) if columns > 0 else 0
    if len(zlib.decompressobj().decompress(b"".join(coded), num_bytes)) < num_bytes:
        raise DamagedSampleError("damaged PNG (its pixels end early)")
