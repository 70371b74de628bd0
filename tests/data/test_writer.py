from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset as wds

from vae_dist.config.errors import ConfigError
from vae_dist.data.index import load_index
from vae_dist.data.writer import write_shards


def samples(count: int) -> Iterator[dict[str, str | bytes]]:
    for i in range(count):
        yield {"__key__": f"{i:04d}", "bin": bytes([i]) * (i % 700), "cls": str(i % 10).encode()}


def test_webdataset_reads_back_what_was_written(tmp_path: Path) -> None:
    paths = write_shards(samples(50), tmp_path / "out", num_shards=3, name="train")
    assert [path.name for path in paths] == [f"train-{i:06d}.tar" for i in range(3)]
    read = list(wds.WebDataset([str(p) for p in paths], shardshuffle=False))
    want = list(samples(50))
    assert {s["__key__"]: (s["bin"], s["cls"]) for s in read} == {
        s["__key__"]: (s["bin"], s["cls"]) for s in want
    }
    info = json.loads((tmp_path / "out/_info.json").read_text())["splits"]["train"]
    assert info["shard_lengths"] == [17, 17, 16]
    index = load_index(str(tmp_path / "out"), key="data.train", create=False)
    assert index.lengths.tolist() == [17, 17, 16]


def test_members_have_plain_headers_and_no_time(tmp_path: Path) -> None:
    (path,) = write_shards(samples(3), tmp_path / "out", num_shards=1)
    with tarfile.open(path) as tar:
        assert all(not m.pax_headers and m.mtime == 0 and m.uid == 0 for m in tar)
    data = path.read_bytes()
    (again,) = write_shards(samples(3), tmp_path / "again", num_shards=1)
    assert again.read_bytes() == data


def test_shards_roll_over_at_their_size(tmp_path: Path) -> None:
    paths = write_shards(samples(40), tmp_path / "out", shard_bytes=20_000)
    index = load_index([str(p) for p in paths], key="data.train", create=False)
    assert len(paths) > 2 and index.num_samples == 40
    first = list(wds.WebDataset(str(paths[0]), shardshuffle=False))
    assert [s["__key__"] for s in first] == [f"{i:04d}" for i in range(len(first))]


def test_nothing_is_left_by_a_write_that_fails(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, str | bytes]]:
        yield from samples(5)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_shards(broken(), tmp_path / "out", num_shards=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keys", [["a.b"], ["a", "a"]])
def test_keys_that_would_merge_samples_are_refused(tmp_path: Path, keys: list[str]) -> None:
    with pytest.raises(ConfigError, match="would merge it"):
        write_shards(({"__key__": k, "cls": b"1"} for k in keys), tmp_path / "o", num_shards=1)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match="exists already"):
        write_shards(samples(1), tmp_path, num_shards=1)
