from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from vae_dist.config.errors import ConfigError
from vae_dist.data.index import load_index
from vae_dist.data.writer import write_shards


def samples(count: int) -> Iterator[dict[str, str | bytes]]:
    for i in range(count):
        yield {"__key__": f"{i:04d}", "bin": bytes([i]) * (i % 700), "cls": str(i % 10).encode()}


@pytest.mark.parametrize(
    ("keys", "lengths"),
    [({"num_shards": 3}, [14, 13, 13]), ({"shard_bytes": 20_000}, [11, 10, 10, 9])],
)
def test_webdataset_reads_back_what_was_written(
    tmp_path: Path, keys: dict[str, Any], lengths: list[int]
) -> None:
    paths = write_shards(samples(40), tmp_path / "out", name="train", **keys)
    assert [path.name for path in paths] == [f"train-{i:06d}.tar" for i in range(len(lengths))]
    read = list(wds.WebDataset([str(p) for p in paths], shardshuffle=False))
    want = {s["__key__"]: (s["bin"], s["cls"]) for s in samples(40)}
    assert {s["__key__"]: (s["bin"], s["cls"]) for s in read} == want
    if "shard_bytes" in keys:
        assert [s["__key__"] for s in read] == sorted(want)
    index = load_index(str(tmp_path / "out"), key="data.train", create=False)
    assert index.lengths.tolist() == lengths and all(index.digests)
    with tarfile.open(paths[0]) as tar:
        assert all(not m.pax_headers and m.mtime == 0 and m.uid == 0 for m in tar)
    again = write_shards(samples(40), tmp_path / "again", name="train", **keys)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths]


def broken() -> Iterator[dict[str, str | bytes]]:
    yield from samples(5)
    raise ConfigError("stop")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (broken(), "stop"),
        ([], "no samples to write"),
        ([{"__key__": "a.b", "cls": b"1"}], "would merge it"),
        ([{"__key__": "a", "cls": b"1"}] * 2, "would merge it"),
    ],
)
def test_nothing_is_left_by_a_write_that_fails(tmp_path: Path, written: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_shards(written, tmp_path / "out", shard_bytes=2000)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match="exists already"):
        write_shards(samples(1), tmp_path, num_shards=1)
