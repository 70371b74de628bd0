from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import png
from vae_dist.data import reader as reader_module
from vae_dist.data.cache import ImageCache, bytes_cached
from vae_dist.data.index import load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import SampleReader
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import write_shards

NUM, BATCH, SIZE = 12, 4, (6, 4)
ALL_BYTES = NUM * (3 * SIZE[0] * SIZE[1] + 8)
SETTINGS = ImageSettings(3, SIZE, True, 2**16, flip=True)


def test_each_image_is_decoded_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    samples = []
    for number in range(NUM):  # sample 5 is no picture
        data = png(random.integers(0, 256, (9, 7, 3), np.uint8)) if number != 5 else b"no picture"
        samples.append({"__key__": f"{number:04d}", "png": data})
    write_shards(samples, tmp_path / "set", num_shards=2)
    index = load_index(str(tmp_path / "set"), key="data.train", create=False)
    decoded, read = [], []
    decode, read_many = reader_module.prepare_sample, SampleReader.read_many

    def counted_decode(sample: Any, *settings: Any, **options: Any) -> Any:
        decoded.append(sample["__key__"])
        return decode(sample, *settings, **options)

    def counted_read(self: SampleReader, parts: Any) -> Any:
        read.extend(parts)
        return read_many(self, parts)

    monkeypatch.setattr(reader_module, "prepare_sample", counted_decode)
    monkeypatch.setattr(SampleReader, "read_many", counted_read)

    def run(epochs: int) -> None:
        order = Order(index.lengths, lanes=BATCH, window=2, seed=3)
        steps = {"start_step": 0, "stop_step": epochs * NUM // BATCH}
        keys = {"batch_size": BATCH, "cache_bytes": ALL_BYTES, **steps}
        assert len(list(TrainingStream(index, order, SETTINGS, **keys))) == steps["stop_step"]

    run(3)
    # what replaces a lost sample is decoded as such, too
    assert NUM - 1 <= len([key for key in decoded if key != "0005"]) <= NUM + 2
    of_three = len(read)
    run(6)
    # after an epoch only the window of the damaged sample is read again
    assert len(read) - of_three <= of_three + 3 * 2


@pytest.mark.parametrize(
    ("keys", "can_be"),
    [
        ({}, True),
        ({"crop": "random"}, False),
        ({"any_size": True}, False),
        ({"buckets": ((4, 6), (6, 4))}, False),
    ],
)
def test_what_fits_is_cached_and_the_plan_knows_it(keys: dict[str, Any], can_be: bool) -> None:
    settings = replace(SETTINGS, **keys)
    for workers, limit in product((0, 1, 3), (ALL_BYTES - 1, ALL_BYTES, 3 * ALL_BYTES)):
        processes = max(1, workers)
        is_cached = can_be and limit // processes >= ALL_BYTES
        found = bytes_cached(NUM, settings, cache_bytes=limit, workers=workers)
        assert found == (processes * ALL_BYTES if is_cached else 0) <= limit
        cache = ImageCache.if_it_fits(NUM, settings, max_bytes=limit // processes)
        assert (cache is not None) == is_cached
