"""JPEGs that are decoded where they are to stay: those that need nothing but their decoding."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vae_dist.data.index import load_index
from vae_dist.data.jpeg import decode_into, orientation
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import SampleReader
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import write_shards

SETTINGS = ImageSettings(channels=3, size=(24, 24), resize=False, max_pixels=1000)
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
COLOUR = Image.fromarray(PIXELS)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def turned(turn: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    return jpeg(COLOUR, exif=exif)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def scratched(data: bytes) -> bytes:
    """With a marker among its coded pixels: a segment that ends early."""
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    return data[:middle] + b"\xff\xc0" + data[middle + 2 :]


WHOLE = jpeg(COLOUR)
SAMPLES: list[tuple[dict[str, bytes], bool]] = [
    ({"jpg": WHOLE, "cls": b"4"}, True),
    ({"jpeg": jpeg(COLOUR.convert("L"))}, True),
    ({"jpg": turned(1)}, True),
    ({"jpg": turned(6)}, False),
    ({"jpg": jpeg(COLOUR.convert("CMYK"))}, False),
    ({"png": png(COLOUR)}, False),
    ({"jpg": b""}, False),
    ({"jpg": WHOLE[:100]}, False),  # no header
    ({"jpg": WHOLE[:-300]}, True),  # a whole header, and half of the pixels
    ({"jpg": scratched(WHOLE)}, True),
    ({"jpg": WHOLE, "png": png(COLOUR)}, False),  # two images
    ({"jpg": WHOLE, "cls": b"four"}, False),
    ({"jpg": WHOLE, "mask.png": png(COLOUR.convert("L"))}, False),
]


@pytest.fixture
def reader(tmp_path: Path) -> SampleReader:
    samples = ({"__key__": f"{i:02d}", **files} for i, (files, _) in enumerate(SAMPLES))
    write_shards(samples, tmp_path / "set", num_shards=1)
    index = load_index(str(tmp_path / "set"), key="data.train", create=False)
    return SampleReader(index, SETTINGS, seed=0)


def test_what_is_plain_is_decoded_alike(reader: SampleReader) -> None:
    room = np.empty((24, 24, 3), np.uint8)
    for i, data in enumerate(reader.read(0, 0, len(SAMPLES))):
        plain = reader.plain_jpeg(data, 0, i)
        assert (plain is not None) == SAMPLES[i][1], i
        if plain is not None and decode_into(plain.data, room):
            image, label = reader.load(data, 0, i, epoch=0)
            assert (image == room.transpose(2, 0, 1)).all() and label == plain.label
        else:
            assert i not in (0, 1, 2)


@pytest.mark.parametrize(
    "change", [{"flip": True}, {"bits": 16}, {"mask": "block"}, {"size": (8, 8)}]
)
def test_what_needs_more_is_not_plain(reader: SampleReader, change: dict[str, Any]) -> None:
    other = SampleReader(reader.index, replace(SETTINGS, **change), seed=0)
    assert other.plain_jpeg(reader.read(0, 0, 1)[0], 0, 0) is None


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_plain_and_other_samples(reader: SampleReader, workers: int) -> None:
    """Each step against samples that are loaded one by one; lost ones show the first readable."""
    order = Order(reader.index.lengths, lanes=4, window=3, seed=0)
    steps = {"start_step": 0, "stop_step": 6, "workers": workers}
    stream = TrainingStream(reader.index, order, SETTINGS, batch_size=4, **steps)
    lost = set()
    for batch in stream:
        lost |= {sample.index for sample in batch.skipped}
        for i, image in enumerate(batch.groups[0].images.numpy()):
            _, shard, index = order.sample_at(4 * batch.step + i)
            if index not in {sample.index for sample in batch.skipped}:
                data = reader.read(shard, index, index + 1)[0]
                assert (reader.load(data, shard, index, epoch=0).image == image).all(), index
    assert lost == {6, 7, 8, 9, 10, 11, 12}


@pytest.mark.parametrize("turn", [1, 3, 8])
def test_the_exif_record_is_found_wherever_it_stands(turn: int) -> None:
    data = turned(turn)
    start = data.index(b"Exif") - 4
    length = 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    exif, rest = data[start : start + length], data[2:start] + data[start + length :]
    # marks of an end of headers, and of a record, that are another segment's bytes
    other = b"\xff\xe2\x00\x0c\xff\xdaExif\0\0AB"
    scan = rest.index(b"\xff\xda")
    for before, after in ((b"", rest), (other, rest), (rest[:scan], rest[scan:])):
        assert orientation(b"\xff\xd8" + before + exif + after) == turn
        assert orientation(memoryview(b"\xff\xd8" + before + exif + after)) == turn
    assert orientation(b"\xff\xd8" + rest + exif) == 1  # behind the pixels
    assert orientation(data[: start + 20]) == 1
    for size in range(12):
        assert orientation(data[:size]) == 1
