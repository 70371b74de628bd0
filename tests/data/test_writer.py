"""Shards that we write: any samples, and the digits that ship with the package."""

import hashlib
import tarfile
from collections import Counter

import numpy as np
import pytest
import webdataset as wds

from tests.data.conftest import load
from vae_dist.config.errors import ConfigError
from vae_dist.data import digits as bundled
from vae_dist.data.loader import EvaluationStream
from vae_dist.data.transforms import ImageSettings
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


def test_the_shards_hold_each_digit_that_ships_once(tmp_path):
    digits = tmp_path / "made" / "digits"
    bundled.make_digits(digits)
    images, labels = bundled.load_digits()
    assert images.shape == (10_000, 28, 28)
    assert hashlib.md5(images.tobytes()).hexdigest() == "eb2514c9b94be0fa2ad6f5eeeb6692e1"
    assert np.bincount(labels).tolist() == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    found = Counter()
    for split, count, num_shards in (("train", 9000, 8), ("validation", 1000, 1)):
        index = load(digits / split)
        assert len(index.paths) == num_shards
        (batch,) = EvaluationStream(index, ImageSettings(1, (28, 28), False, 784), batch_size=count)
        assert len(set(batch.labels[:100].tolist())) == 10, "shuffled"
        found.update(zip(map(bytes, batch.images.numpy()), batch.labels.tolist(), strict=True))
    assert found == Counter(zip(map(bytes, images), labels.tolist(), strict=True))
    assert np.bincount(batch.labels).tolist() == [100] * 10
    assert [path.name for path in digits.parent.iterdir()] == [digits.name]
    bundled.make_digits(digits)  # which are there
    with pytest.raises(ConfigError, match="cannot write the digits"):
        bundled.make_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
