"""Shards from elsewhere: what is read, tried again, named, and refused."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import LENGTHS
from tests.data.test_loader import BATCH, STEPS, expected, global_batches, one_process
from tests.support.http_shards import EMPTY, RESET, serving
from vae_dist.data import sources
from vae_dist.data.index import load_index
from vae_dist.data.indexing import write_index_of_remote
from vae_dist.data.sources import Range, UnreadableError, read_all, read_range, read_ranges
from vae_dist.data.tar import ShardError
from vae_dist.data.transforms import ImageSettings

__all__ = ["one_process"]  # a fixture


pytestmark = pytest.mark.usefixtures("pauses")


@pytest.fixture
def blob(tmp_path: Path) -> bytes:
    data = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "blob").write_bytes(data)
    return data


@pytest.mark.parametrize(
    ("way", "world", "workers"),
    [("pattern", 1, 0), ("folder", 8, 3), ("pipe", 1, 0), ("pipe", 2, 3), ("fsspec", 2, 1)],
)
def test_the_same_steps_from_everywhere(
    folder: Path,
    marked: ImageSettings,
    one_process: None,
    tmp_path: Path,
    way: str,
    world: int,
    workers: int,
) -> None:
    steps = {"start_step": STEPS // 2, "stop_step": STEPS // 2 + 6}
    with serving(folder) as server:
        if way == "pipe":
            urls = [f"pipe:cat {path}" for path in sorted(folder.glob("*.tar"))]
            assert set(write_index_of_remote(urls, tmp_path / "index").values()) == {None}
            spec = {"path": urls, "index": str(tmp_path / "index")}
        elif way == "fsspec":
            spec = f"file://{folder}/set-{{00..09}}.tar"
        else:
            spec = f"{server.url}/set-{{00..09}}.tar" if way == "pattern" else f"{server.url}/"
        index = load_index(spec, key="data.train", create=False)
        assert index.lengths.tolist() == list(LENGTHS)
        got = global_batches(index, marked, world=world, workers=workers, **steps)
    assert got == expected(STEPS // 2, STEPS // 2 + 6)


def test_a_set_is_opened_by_one_request_and_after_a_resume_two_windows_of_a_lane_are_read(
    folder: Path, marked: ImageSettings, one_process: None
) -> None:
    with serving(folder) as server:
        index = load_index(server.url, key="data.train", create=False)
        assert server.asked == {"_info.json": 1}
        assert index.fingerprint == load_index(str(folder), key="data", create=False).fingerprint
        server.sent.clear()
        steps = {"start_step": STEPS - 3, "stop_step": STEPS - 2}
        global_batches(index, marked, world=1, workers=0, **steps)
        tars = sum(count for path, count in server.sent.items() if path.endswith(".tar"))
        largest = max(int(np.diff(index.offsets(s)).max()) for s in range(1, 10))
        assert 0 < tars <= 2 * BATCH * 4 * largest


@pytest.mark.parametrize("trouble", [500, 503, 429, RESET, EMPTY, -1000])
def test_trouble_is_tried_again_with_growing_pauses(
    tmp_path: Path, blob: bytes, pauses: list[float], trouble: int
) -> None:
    with serving(tmp_path, lambda path, n: trouble if n < 4 else None) as server:
        assert read_range(f"{server.url}/blob", 1000, 50_000) == blob[1000:51_000]
    assert pauses == [0.2, 0.4, 0.8, 1.6]


def test_many_pieces_are_read_at_once_and_each_has_its_own_outcome(
    tmp_path: Path, blob: bytes
) -> None:
    with serving(tmp_path, lambda path, n: 500 if path == "blob" and n < 3 else None) as server:
        there = [Range(f"{server.url}/blob", 1000 * i, 500) for i in range(20)]
        missing = Range(f"{server.url}/nothing", 0, 5)
        *found, lost = read_ranges([*there, missing])
        assert found == [blob[1000 * i : 1000 * i + 500] for i in range(20)]
        assert isinstance(lost, UnreadableError) and lost.is_missing
        again = pickle.loads(pickle.dumps(lost))  # on its way from a worker
        assert again.is_missing and str(again) == str(lost)
        asked = server.asked["blob"]
        assert read_range(f"{server.url}/blob", 299_000, 5000) == blob[299_000:]
        assert server.asked["blob"] == asked + 1, "the end of a file is no break"


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (404, r"blob: cannot be read \(no such file"),
        (403, "HTTP 403"),
        (500, r"in 100 s \(HTTP 500"),
        ("file:///etc/passwd", "passwd|redirect"),
        (EMPTY, "sends no byte"),
    ],
)
def test_what_lasts_stops_with_the_address(
    tmp_path: Path, blob: bytes, pauses: list[float], trouble: int | str, message: str
) -> None:
    broken = serving(tmp_path, lambda path, n: trouble)
    with broken as server, pytest.raises(ShardError, match=message):
        read_range(f"{server.url}/blob", 0, 10, retry_s=100)
    assert 60 < sum(pauses) <= 100 if trouble in (500, EMPTY) else not pauses


def test_a_redirect_is_followed_on_http_and_never_down_from_https(
    tmp_path: Path, blob: bytes
) -> None:
    import asyncio
    from types import SimpleNamespace

    from yarl import URL

    with serving(tmp_path) as there:
        moved = serving(tmp_path, lambda path, n: f"{there.url}/{path}")
        with moved as server:
            assert read_range(f"{server.url}/blob", 5, 10) == blob[5:15]
    (trace,) = sources._http_options()["client_kwargs"]["trace_configs"]
    (check,) = trace.on_request_redirect
    for start, target, is_allowed in (
        ("https://a/x", "https://b/x", True),
        ("http://a/x", "https://a/x", True),
        ("https://a/x", "/y", True),
        ("https://a/x", "http://a/x", False),
        ("http://a/x", "ftp://a/x", False),
    ):
        response = SimpleNamespace(headers={"Location": target})
        redirect = check(None, None, SimpleNamespace(url=URL(start), response=response))
        if is_allowed:
            asyncio.run(redirect)
        else:
            with pytest.raises(ValueError, match="redirected from http"):
                asyncio.run(redirect)


def test_a_server_without_pieces_is_named_and_no_more_is_read_than_was_asked_for(
    tmp_path: Path, blob: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, ranges=False) as server:
        with pytest.raises(ShardError, match=r"answers with the whole file .* 'pipe:curl"):
            read_range(f"{server.url}/blob", 5, 10)
        assert read_range(f"{server.url}/blob", 0, 10) == blob[:10]
    for place in (str(tmp_path / "blob"), f"file://{tmp_path}/blob"):
        assert read_all(place, 300_000) == blob
        with pytest.raises(ShardError, match="larger than the 299999 bytes"):
            read_all(place, 299_999)
    with pytest.raises(ShardError, match="but no index"):
        read_all(f"pipe:touch {tmp_path}/made", 10)
    assert not (tmp_path / "made").exists()


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    for place in (str(tmp_path / "x.tar"), "/dev/zero", str(tmp_path)):
        with pytest.raises(ShardError, match="no plain file"):
            read_range(place, 0, 10)
        with pytest.raises(ShardError, match="no plain file"):
            sources.size_of(place)


def test_a_server_that_is_too_slow_is_asked_again(
    tmp_path: Path, blob: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(sources, "BYTES_PER_MINUTE", 1 << 40)
    release, calls = threading.Event(), list[int]()

    def wait(path: str, number: int) -> None:
        calls.append(number)
        if len(calls) < 6:
            release.wait(5)

    with serving(tmp_path, wait) as server:
        assert read_range(f"{server.url}/blob", 5, 10) == blob[5:15]
        release.set()
    assert "less than 1048576 MiB a minute); it is tried again" in capsys.readouterr().err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ShardError, match=r"attempts in 20 s .*127\.0\.0\.1"):
        read_range("http://user:word@127.0.0.1:9/x.tar", 0, 1)
    said = capsys.readouterr().err
    assert "it is tried again for 20 s" in said and "user:word" not in said


def test_pipes_go_on_and_start_again(tmp_path: Path, blob: bytes) -> None:
    place = f"pipe:echo >> {tmp_path}/starts; cat {tmp_path}/blob"
    for start in (0, 100, 5000, 50):
        assert read_range(place, start, 50) == blob[start : start + 50]
    assert (tmp_path / "starts").read_text() == "\n\n"
    assert read_range(place, 299_990, 50) == blob[-10:]
    with pytest.raises(ShardError, match=r"attempts .*ended with exit code 3"):
        read_range("pipe:exit 3", 0, 1)


@pytest.mark.parametrize("protocol", ["memory://", "strict://"])
def test_what_an_object_store_lacks_is_missing_at_once(pauses: list[float], protocol: str) -> None:
    """Some stores, such as s3, raise where a size is asked of what is not there."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Strict(MemoryFileSystem):
        protocol = "strict"

        def size(self, path: str) -> int:
            raise FileNotFoundError(path)

    fsspec.register_implementation("strict", Strict, clobber=True)
    assert not sources.exists(f"{protocol}nowhere/_info.json")
    with pytest.raises(ShardError, match="no such file"):
        read_range(f"{protocol}nowhere/a.tar", 0, 10)
    assert pauses == []
