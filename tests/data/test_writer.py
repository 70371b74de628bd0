"""Shards that we write: any samples, and the digits that ship with the package."""

import hashlib
import tarfile
from collections import Counter

import numpy as np
import pytest
import webdataset as wds

from tests.data.conftest import load
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import DataConfig
from vae_dist.data import digits as bundled
from vae_dist.data.loader import EvaluationStream
from vae_dist.data.settings import image_settings
from vae_dist.data.writer import write_shards


def samples(count):
    for i in range(count):
        yield {"__key__": f"{i:04d}", "bin": bytes([i]) * (i % 700), "cls": str(i % 10).encode()}


@pytest.mark.parametrize(
    ("keys", "lengths"),
    [({"num_shards": 3}, [14, 13, 13]), ({"shard_bytes": 20_000}, [11, 10, 10, 9])],
)
def test_webdataset_reads_back_what_was_written(tmp_path, keys, lengths):
    paths = write_shards(samples(40), tmp_path / "out", name="train", **keys)
    assert [path.name for path in paths] == [f"train-{i:06d}.tar" for i in range(len(lengths))]
    read = list(wds.WebDataset([str(p) for p in paths], shardshuffle=False))
    want = {s["__key__"]: (s["bin"], s["cls"]) for s in samples(40)}
    assert {s["__key__"]: (s["bin"], s["cls"]) for s in read} == want
    if "shard_bytes" in keys:
        assert [s["__key__"] for s in read] == sorted(want)
    index = load(tmp_path / "out")
    assert index.lengths.tolist() == lengths and all(index.digests)
    with tarfile.open(paths[0]) as tar:
        assert all(not m.pax_headers and m.mtime == 0 and m.uid == 0 for m in tar)
    again = write_shards(samples(40), tmp_path / "again", name="train", **keys)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths]


def test_nothing_is_left_by_a_write_that_fails(tmp_path):
    def broken():
        yield from samples(5)
        raise ConfigError("stop")

    one = {"__key__": "a", "cls": b"1"}
    for found, message in (
        (broken(), "stop"),
        ([], "no samples to write"),
        ([{**one, "__key__": "a.b"}], "would merge it"),
        ([one] * 2, "would merge it"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_shards(found, tmp_path / "out", shard_bytes=2000)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match="exists already"):
        write_shards(samples(1), tmp_path, num_shards=1)


def stored(folder):
    index, data = load(folder), DataConfig(channels=1, resolution="native", max_pixels=10**6)
    batches = list(EvaluationStream(index, image_settings(index, data), batch_size=1000))
    images = [image.numpy().tobytes() for batch in batches for image in batch.images]
    return images, [label for batch in batches for label in batch.labels.tolist()]


def test_the_shards_hold_each_digit_that_ships_once(tmp_path, monkeypatch):
    digits = tmp_path / "made" / "digits"
    assert bundled.make_digits(digits) is True
    images, labels = bundled.load_digits()
    assert images.shape == (10_000, 28, 28) and images.dtype == np.uint8
    assert hashlib.md5(images.tobytes()).hexdigest() == "eb2514c9b94be0fa2ad6f5eeeb6692e1"
    assert np.bincount(labels).tolist() == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    want = Counter(zip((image.tobytes() for image in images), labels.tolist(), strict=True))
    parts = [stored(digits / split) for split in ("train", "validation")]
    assert [len(part[0]) for part in parts] == [9_000, 1_000]
    assert Counter(pair for part in parts for pair in zip(*part, strict=True)) == want
    assert Counter(parts[1][1]) == dict.fromkeys(range(10), 100)
    assert len(set(parts[0][1][:100])) == 10, "shuffled"
    assert len(list((digits / "train").glob("*.tar"))) == 8
    assert [path.name for path in digits.parent.iterdir()] == [digits.name]
    monkeypatch.setattr(bundled, "load_digits", lambda: pytest.fail("read again"))
    assert bundled.make_digits(digits) is False
    monkeypatch.undo()
    (tmp_path / "mine.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "mine.txt" / "mnist10k"):
        with pytest.raises(ConfigError, match="cannot write the digits"):
            bundled.make_digits(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "mine.txt"]
