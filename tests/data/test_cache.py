from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vae_dist.data import reader as reader_module
from vae_dist.data.cache import ImageCache, bytes_cached
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.loader import Batch, TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import SampleReader
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import write_shards

NUM, BATCH, SIZE = 12, 4, (6, 4)
ALL_BYTES = NUM * (3 * SIZE[0] * SIZE[1] + 8)
SETTINGS = ImageSettings(3, SIZE, True, 2**16, flip=True)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Pictures of 9 x 7 pixels with labels; sample 5 is no picture."""
    random = np.random.default_rng(0)
    samples = []
    for number in range(NUM):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (9, 7, 3), np.uint8)).save(file, "PNG")
        data = file.getvalue() if number != 5 else b"no picture"
        samples.append({"__key__": f"{number:04d}", "png": data, "cls": str(number).encode()})
    folder: Path = tmp_path_factory.mktemp("kept") / "set"
    write_shards(samples, folder, num_shards=2)
    return load_index(str(folder), key="data.train", create=False)


def batches(
    index: ShardIndex, settings: ImageSettings, *, epochs: int = 3, **kwargs: Any
) -> Iterator[Batch]:
    return iter(
        TrainingStream(
            index,
            Order(index.lengths, lanes=BATCH, window=2, seed=3),
            settings,
            batch_size=BATCH,
            start_step=0,
            stop_step=epochs * NUM // BATCH,
            **kwargs,
        )
    )


def test_each_image_is_decoded_and_read_once(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, read = [], []
    decode, read_bytes = reader_module.prepare_sample, SampleReader.read_many

    def counted_decode(sample: Any, *settings: Any, **options: Any) -> Any:
        decoded.append(sample["__key__"])
        return decode(sample, *settings, **options)

    def counted_read(self: SampleReader, parts: Any) -> Any:
        read.extend(parts)
        return read_bytes(self, parts)

    monkeypatch.setattr(reader_module, "prepare_sample", counted_decode)
    monkeypatch.setattr(SampleReader, "read_many", counted_read)
    steps = [number for number, _ in enumerate(batches(index, SETTINGS, cache_bytes=ALL_BYTES))]
    assert len(steps) == 9
    good = [key for key in decoded if key != "0005"]
    # what replaces a lost sample is decoded as such, too
    assert NUM - 1 <= len(good) <= NUM + 2
    first_epoch = len(read)
    list(batches(index, SETTINGS, epochs=6, cache_bytes=ALL_BYTES))
    # after an epoch only the window of the damaged sample is read again
    assert len(read) - first_epoch <= first_epoch + 3 * 2


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, crop="random")])
@pytest.mark.parametrize("cache_bytes", [ALL_BYTES - 1, ALL_BYTES, 3 * ALL_BYTES])
def test_the_plan_knows_what_a_rank_keeps(
    settings: ImageSettings, cache_bytes: int, workers: int
) -> None:
    processes = max(1, workers)
    share = cache_bytes // processes
    is_kept = ImageCache.if_it_fits(NUM, settings, max_bytes=share) is not None
    found = bytes_cached(NUM, settings, cache_bytes=cache_bytes, workers=workers)
    assert found == (processes * ALL_BYTES if is_kept else 0) <= cache_bytes


def test_what_has_no_room_or_is_cropped_anew_is_not_kept() -> None:
    assert ImageCache.if_it_fits(NUM, SETTINGS, max_bytes=ALL_BYTES) is not None
    assert ImageCache.if_it_fits(NUM, SETTINGS, max_bytes=ALL_BYTES - 1) is None
    assert ImageCache.if_it_fits(NUM, replace(SETTINGS, crop="random"), max_bytes=2**30) is None
    assert ImageCache.if_it_fits(NUM, replace(SETTINGS, any_size=True), max_bytes=2**30) is None
    buckets = replace(SETTINGS, buckets=((4, 6), (6, 4)))
    assert ImageCache.if_it_fits(NUM, buckets, max_bytes=2**30) is None
