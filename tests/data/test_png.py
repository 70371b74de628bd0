from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from vae_dist.data.png import decode_plain, encode_plain

GREY = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (4, 3, 3), dtype=np.uint8)


@pytest.mark.parametrize("image", [GREY, COLOUR, np.zeros((1, 1), np.uint8)])
def test_pillow_reads_what_is_encoded_and_so_do_we(image: np.ndarray) -> None:
    data = encode_plain(image)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    decoded = decode_plain(data, max_pixels=35)
    assert decoded is not None
    np.testing.assert_array_equal(decoded, image)


def test_any_damage_is_left_to_pillow() -> None:
    data = encode_plain(GREY)
    # the length of IHDR, and the length and checksum of IEND say nothing that could be wrong
    silent = {8, 9, 10, 11, *range(len(data) - 12, len(data) - 8), *range(len(data) - 4, len(data))}
    for i in range(len(data)):
        broken = bytearray(data)
        broken[i] ^= 1
        if i not in silent:
            assert decode_plain(bytes(broken), max_pixels=100) is None, i
        assert decode_plain(data[:i], max_pixels=100) is None


def test_more_pixels_than_allowed_are_left_to_pillow() -> None:
    assert decode_plain(encode_plain(GREY), max_pixels=34) is None


def test_rows_with_filters_are_left_to_pillow() -> None:
    smooth = np.add.outer(np.arange(30), np.arange(30)).astype(np.uint8)
    filtered = io.BytesIO()
    Image.fromarray(smooth).save(filtered, "PNG")
    assert decode_plain(filtered.getvalue(), max_pixels=1000) is None


def test_more_data_than_the_header_says_is_left_to_pillow() -> None:
    long, short = encode_plain(np.zeros((50, 50), np.uint8)), encode_plain(GREY)
    head, data = short[:33], long[33:]
    assert zlib.crc32(data) and decode_plain(head + data, max_pixels=100) is None
