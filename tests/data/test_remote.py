"""Shards from elsewhere: what is read, tried again, named, and refused."""

import asyncio
import json
import os
import pickle
import shutil
import sys
import threading
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from yarl import URL

from tests.data.conftest import LENGTHS, STEPS, expected, global_batches, load, refused
from tests.support.http_shards import EMPTY, RESET, serving
from tests.support.tiny_run import tiny_config
from vae_dist.config.errors import ConfigError
from vae_dist.data import sources
from vae_dist.data.index import Run, write_index_of_remote
from vae_dist.data.sources import Range, read_all, read_range, read_ranges
from vae_dist.data.tar import ShardError
from vae_dist.index import main
from vae_dist.inference.load import open_images

pytestmark = pytest.mark.usefixtures("pauses")
ALL = "set-{00..09}.tar"


@pytest.fixture
def blob(tmp_path):
    data = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "blob").write_bytes(data)
    return data


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        *[(status, rf"in 100 s \(HTTP {status}") for status in (429, 500, 503)],
        (EMPTY, "sends no byte"),
        (RESET, "in 100 s"),
        (-1000, "in 100 s"),
        (404, r"blob: cannot be read \(no such file"),
        (403, "HTTP 403"),
        ("file:///etc/passwd", "passwd|redirect"),
    ],
)
def test_trouble_is_tried_again_unless_it_lasts(tmp_path, blob, pauses, trouble, message):
    passes = trouble not in (404, 403, "file:///etc/passwd")
    if passes:
        with serving(tmp_path, lambda path, n: trouble if n < 3 else None) as server:
            pieces = [Range(f"{server.url}/blob", 9000 * i, 5000) for i in range(20)]
            assert read_ranges(pieces) == [blob[9000 * i : 9000 * i + 5000] for i in range(20)]
            assert pauses == [0.2] and server.asked["blob"] == 23, "all at once"
        pauses.clear()
    broken = serving(tmp_path, lambda path, n: trouble)
    with broken as server, pytest.raises(ShardError, match=message) as lost:
        read_range(f"{server.url}/blob", 0, 5000, retry_s=100)
    again = pickle.loads(pickle.dumps(lost.value))  # on its way from a worker
    assert str(again) == str(lost.value)
    assert pauses == ([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30] if passes else [])


def test_a_redirect_is_followed_on_http_and_never_down_from_https(tmp_path, blob):
    with serving(tmp_path) as there, serving(tmp_path, lambda p, n: f"{there.url}/{p}") as server:
        assert read_range(f"{server.url}/blob", 5, 10) == blob[5:15]
    (trace,) = sources._http_options()["client_kwargs"]["trace_configs"]
    (check,) = trace.on_request_redirect

    def redirect(url, target):
        response = SimpleNamespace(headers={"Location": target})
        asyncio.run(check(None, None, SimpleNamespace(url=URL(url), response=response)))

    redirect("http://a/x", "https://a/x")
    redirect("https://a/x", "/y")
    for url, target in (("https://a/x", "http://a/x"), ("http://a/x", "ftp://a/x")):
        with pytest.raises(ValueError, match="redirected from http"):
            redirect(url, target)


def test_no_more_is_read_than_was_asked_for_and_no_place_without_an_end(tmp_path, blob):
    with serving(tmp_path, ranges=False) as server:
        with pytest.raises(ShardError, match=r"answers with the whole file .* 'pipe:curl"):
            read_range(f"{server.url}/blob", 5, 10)
        assert read_range(f"{server.url}/blob", 0, 10) == blob[:10]
        server.asked.clear()
        assert read_range(f"{server.url}/blob", 0, 10**6) == blob
        assert server.asked["blob"] == 1, "the end of a file is no break"
    assert read_all(f"file://{tmp_path}/blob", 300_000) == blob
    with pytest.raises(ShardError, match="no such file"):
        read_all(f"file://{tmp_path}/nothing", 10)
    with pytest.raises(ShardError, match="larger than the 299999 bytes"):
        read_all(str(tmp_path / "blob"), 299_999)
    os.mkfifo(tmp_path / "x.tar")
    for place in (str(tmp_path / "x.tar"), "/dev/zero", str(tmp_path)):
        for ask in (lambda place: read_range(place, 0, 10), sources.size_of):
            with pytest.raises(ShardError, match="no plain file"):
                ask(place)


def test_servers_that_are_gone_or_slow_and_a_missing_package(tmp_path, blob, monkeypatch, capsys):
    with pytest.raises(ShardError, match=r"attempts in 20 s .*127\.0\.0\.1"):
        read_range("http://user:word@127.0.0.1:9/x.tar", 0, 1)
    said = capsys.readouterr().err
    assert "it is tried again for 20 s" in said and "user:word" not in said
    monkeypatch.setattr(sources, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(sources, "BYTES_PER_MINUTE", 1 << 40)
    release = threading.Event()
    with serving(tmp_path, lambda path, n: release.wait(60) and None) as server:
        with pytest.raises(ShardError, match=r"in 20 s .*less than 1048576 MiB a min"):
            read_range(f"{server.url}/blob", 5, 10)
        release.set()
        assert read_range(f"{server.url}/blob", 5, 10) == blob[5:15]
    sources._http_options.cache_clear()
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ShardError, match=r"pip install 'vae_dist\[remote\]'\)$"):
        read_range("http://127.0.0.1:9/x.tar", 0, 1)


def test_pipes_go_on_and_start_again(tmp_path, blob, monkeypatch):
    place = f"pipe:echo >> {tmp_path}/starts; cat {tmp_path}/blob"
    for start in (0, 100, 5000, 50):
        assert read_range(place, start, 50) == blob[start : start + 50]
    assert (tmp_path / "starts").read_text() == "\n\n"
    assert read_range(place, 299_990, 50) == blob[-10:]
    with pytest.raises(ShardError, match=r"attempts .*ended with exit code 3"):
        read_range("pipe:exit 3", 0, 1)
    with pytest.raises(ShardError, match="but no index"):
        read_all(f"pipe:touch {tmp_path}/made", 10)
    assert not (tmp_path / "made").exists()
    monkeypatch.setattr(sources, "MAX_PIPES", 1)
    assert read_range("pipe:yes", 0, 2) == b"y\n"  # the others end
    (pipe,) = sources._pipes.values()
    sources._end(pipe)
    assert "cat" not in [child.name() for child in psutil.Process().children(recursive=True)]


@pytest.mark.parametrize(
    ("way", "world", "workers"),
    [("pattern", 1, 0), ("folder", 8, 3), ("pipe", 2, 3), ("fsspec", 2, 1)],
)
def test_the_same_steps_from_everywhere(folder, one_process, tmp_path, way, world, workers):
    start, stop = STEPS // 2, STEPS // 2 + 6
    with serving(folder) as server:
        urls = [f"pipe:cat {path}" for path in sorted(folder.glob("*.tar"))]
        write_index_of_remote(urls, tmp_path / "index")
        specs = {
            "pattern": f"{server.url}/{ALL}",
            "folder": server.url,
            "fsspec": f"file://{folder}/{ALL}",
            "pipe": {"path": urls, "index": str(tmp_path / "index")},
        }
        index = load(specs[way])
        if way == "folder":
            assert server.asked == {"_info.json": 1}, "one request opens a set"
            assert index.fingerprint == load(folder).fingerprint
        keys = {"world": world, "workers": workers, "start_step": start, "stop_step": stop}
        assert global_batches(index, **keys) == expected(start, stop)
        if way == "pattern":  # after a resume two windows of each lane are read
            server.sent.clear()
            global_batches(index, start_step=STEPS - 3, stop_step=STEPS - 2)
            tars = sum(count for path, count in server.sent.items() if path.endswith(".tar"))
            assert 0 < tars <= 2 * 8 * 4 * 2048  # windows, lanes, rows, bytes of a sample


def test_addresses_with_a_signature_and_wrong_ones(folder):
    signature, here = "?sig=a/b.c&sv=2", load(folder)
    with serving(folder, query=signature) as server:
        for spec in (f"{server.url}/{ALL}{signature}", f"{server.url}/{signature}"):
            index = load(spec)
            assert index.fingerprint == here.fingerprint
            assert str(index.offsets([Run(3, 0, 30)])) == str(here.offsets([Run(3, 0, 30)]))
    for status in (403, 404, 500):  # S3 forbids what is not there
        with serving(folder, lambda p, n, s=status: s if p == "_info.json" else None) as server:
            refused(server.url, r"cannot be read .*name the shards")
            if status == 500:
                refused(f"{server.url}/{ALL}", "HTTP 500")
            else:
                assert load(f"{server.url}/{ALL}").lengths.tolist() == list(LENGTHS)
                assert server.asked["set-00.tar.idx"] == 1
    with serving(folder, lambda p, n: 404 if p == "_info.json" else 500) as server:
        refused(f"{server.url}/{ALL}", "HTTP 500")  # which does not mean that there is no index
        with pytest.raises(ShardError, match=r"json: cannot be read \(no such"):  # what lasts
            read_ranges([Range(f"{server.url}/{name}", 0, 9) for name in ("x", "_info.json")])
    with serving(folder) as server:
        missing = r"set-10\.tar has no index; .*index data='http.*out=FOLDER"
        refused(f"{server.url}/set-{{08..11}}.tar", missing)
        refused(f"{server.url}/nowhere/", r"no such file.*name the shards")
        refused(f"{server.url}/set-00.json", "no such file")
    refused("pipe:cat x.tar", r"pipe:cat x\.tar has no index; .*index: FOLDER")


def test_the_index_of_remote_shards(folder, tmp_path, capsys):
    for sidecar in (*folder.glob("*.idx"), folder / "_info.json"):
        sidecar.unlink()
    out = tmp_path / "index"

    def indexed(server, *keys, code=0):
        assert main([f"data={server.url}/{ALL}", f"out={out}", *keys]) == code
        return capsys.readouterr()

    with serving(folder) as server:
        assert main([f"data={server.url}/{ALL}"]) == 2
        assert "name a folder for their index" in capsys.readouterr().err
        lines = indexed(server, "verify=true").out.splitlines()
        counts = f"shards=10 indexed_now=10 indexed_before=0 damaged=0 samples={sum(LENGTHS)}"
        assert lines[-1] == counts and "sizes HxW: 1x3 (122); 1 different" in lines
        assert any(line.startswith("double keys: 77, the first is") for line in lines)
        next(out.glob("set-02.tar-*.idx")).unlink()
        shutil.copy(folder / "set-05.tar", folder / "set-03.tar")  # of another size
        assert "indexed_now=2 indexed_before=8" in indexed(server).out
        index = load({"path": f"{server.url}/{ALL}", "index": str(out)})
        assert index.lengths.tolist() == [*LENGTHS[:3], LENGTHS[5], *LENGTHS[4:]]
    (folder / "set-05.tar").write_bytes((folder / "set-05.tar").read_bytes()[:1536])
    (folder / "set-06.tar").unlink()
    with serving(folder) as server:  # another address
        said, err = indexed(server, code=1)
    assert "set-05.tar: byte 1024: the tar ends inside a file" in err and "HTTP 404" in err
    assert said.endswith("indexed_now=8 indexed_before=0 damaged=2 samples=0\n")


HELD_BACK = r"names .*; a file of shards may name only files beside or below it"
ELSEWHERE = [
    "pipe:touch {made}", "file:///etc/passwd", "file:passwd", "/etc/passwd", "../x.tar",
    "a/../../x.tar", "https://elsewhere.example/x.tar", "s3://bucket/x.tar",
    "x.tar::file:///etc/passwd",
]  # fmt: skip


def test_a_wids_index_names_no_command_and_no_place_elsewhere(folder, tmp_path):
    lists = folder / "shards.json"
    shards = [{"url": f"set-{i:02d}.tar", "nsamples": n} for i, n in enumerate(LENGTHS)]
    lists.write_text(json.dumps({"shardlist": shards}))
    assert load(lists).lengths.tolist() == list(LENGTHS)
    for text in ("[]", '{"shardlist": [{"url": "set-03.tar", "nsamples": 1e999}]}'):
        lists.write_text(text)
        refused(lists, "is no list of shards")
    with serving(folder) as server:

        def listed(entry, place, message):
            entry = {"url": "set-03.tar", "nsamples": 30, **entry}
            lists.write_text(json.dumps({"shardlist": [entry]}))
            if message:
                refused(f"{place}/shards.json", message, create=True)
            else:
                assert load(f"{place}/shards.json").num_samples == 30

        listed({"nsamples": 31}, str(folder), "")  # its sidecar knows better
        listed({"nsamples": -1}, str(folder), "is no list of shards")
        for place in (server.url, str(folder)):
            for name in ELSEWHERE:
                for field in ("url", "index"):
                    listed({field: name.format(made=tmp_path / "made")}, place, HELD_BACK)
        listed({"url": f"{server.url}/set-03.tar"}, server.url, "")  # its own host
        listed({"url": f"{server.url}/set-03.tar"}, str(folder), HELD_BACK)  # which a file has not
    assert not (tmp_path / "made").exists()


def test_files_and_run_folders_name_no_command_but_the_user_may(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:touch made; cat x.tar").touch()
    refused(".", "rename it", create=True)
    config, command = tiny_config(), "pipe:touch made"
    with pytest.raises(ConfigError, match="only local paths and http"):
        open_images(config, [{"path": command, "weight": 1}], create=True, key="data.train")
    with pytest.raises(ConfigError, match="has no index"):
        open_images(config, command, create=True)
    assert not (tmp_path / "made").exists()
