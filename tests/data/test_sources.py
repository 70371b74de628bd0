from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import LENGTHS
from tests.data.test_loader import BATCH, STEPS, expected, global_batches, one_process
from tests.support.http_shards import serving
from tests.support.tiny_run import tiny_config
from vae_dist.config.errors import ConfigError
from vae_dist.data import sources as remote
from vae_dist.data.index import load_index
from vae_dist.data.indexing import write_index_of_remote, write_info
from vae_dist.data.sources import Range, UnreadableError, read_range, read_ranges
from vae_dist.data.tar import ShardError
from vae_dist.data.transforms import ImageSettings
from vae_dist.index import main
from vae_dist.inference.load import open_images

__all__ = ["one_process"]  # a fixture


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which no test waits for: its clock has only them."""
    waited: list[float] = []
    monkeypatch.setattr(remote, "sleep", waited.append)
    monkeypatch.setattr(remote, "clock", lambda: sum(waited))
    return waited


@pytest.fixture
def folder(shards: str, tmp_path: Path) -> Path:
    """Shards with sidecars and `_info.json`, to be served."""
    copy = Path(shutil.copytree(shards, tmp_path / "served"))
    write_info(sorted(copy.glob("*.tar")), split="train")
    return copy


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


def test_a_set_of_shards_is_opened_by_one_request(folder: Path) -> None:
    with serving(folder) as server:
        load_index(server.url, key="data.train", create=False)
        assert server.asked == {"_info.json": 1}


def test_after_a_resume_one_window_of_each_lane_is_read(
    folder: Path, marked: ImageSettings, one_process: None
) -> None:
    with serving(folder) as server:
        index = load_index(server.url, key="data.train", create=False)
        server.sent.clear()
        step = STEPS - 3
        global_batches(index, marked, world=1, workers=0, start_step=step, stop_step=step + 1)
        tars = sum(count for path, count in server.sent.items() if path.endswith(".tar"))
        largest = max(int(np.diff(index.offsets(s)).max()) for s in range(1, 10))
        assert 0 < tars <= 2 * BATCH * 4 * largest  # this window and the one after it


def test_a_remote_copy_is_the_same_data_set(folder: Path) -> None:
    with serving(folder) as server:
        there = load_index(server.url, key="data.train", create=False)
    assert there.fingerprint == load_index(str(folder), key="data", create=False).fingerprint


@pytest.mark.parametrize("trouble", [500, 503, 429, -1, -1000])
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


def test_the_end_of_a_file_is_no_break(tmp_path: Path, blob: bytes) -> None:
    with serving(tmp_path) as server:
        assert read_range(f"{server.url}/blob", 299_000, 5000) == blob[299_000:]
        assert server.asked["blob"] == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, r"blob: cannot be read \(no such file"),
        (403, "HTTP 403"),
        (500, r"in 100 s \(HTTP 500"),
    ],
)
def test_what_lasts_stops_with_the_address(
    tmp_path: Path, blob: bytes, pauses: list[float], status: int, message: str
) -> None:
    broken = serving(tmp_path, lambda path, n: status)
    with broken as server, pytest.raises(ShardError, match=message):
        read_range(f"{server.url}/blob", 0, 10, retry_s=100)
    assert 60 < sum(pauses) <= 100 if status == 500 else not pauses


def test_a_server_without_pieces_is_named(tmp_path: Path, blob: bytes) -> None:
    message = "answers with the whole file .* 'pipe:curl"
    with serving(tmp_path, ranges=False) as server:
        with pytest.raises(ShardError, match=message):
            read_range(f"{server.url}/blob", 5, 10)
        assert read_range(f"{server.url}/blob", 0, 10) == blob[:10]


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ShardError, match=r"attempts in 20 s .*127\.0\.0\.1"):
        read_range("http://127.0.0.1:9/x.tar", 0, 1)
    assert "it is tried again for 20 s" in capsys.readouterr().err


def test_pipes_go_on_and_start_again(tmp_path: Path, blob: bytes) -> None:
    place = f"pipe:echo >> {tmp_path}/starts; cat {tmp_path}/blob"
    for start in (0, 100, 5000, 50):
        assert read_range(place, start, 50) == blob[start : start + 50]
    assert (tmp_path / "starts").read_text() == "\n\n"
    assert read_range(place, 299_990, 50) == blob[-10:]
    with pytest.raises(ShardError, match=r"attempts .*ended with exit code 3"):
        read_range("pipe:exit 3", 0, 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{url}/set-{{08..11}}.tar", r"set-10\.tar has no index; .*index data='http.*out=FOLDER"),
        ("{url}/nowhere/", r"no such file.*name the shards"),
        ("pipe:cat x.tar", r"pipe:cat x\.tar has no index; .*index: FOLDER"),
        ("{url}/set-00.json", "no such file"),
    ],
)
def test_wrong_addresses_are_named(folder: Path, spec: str, message: str) -> None:
    with serving(folder) as server, pytest.raises(ConfigError, match=message):
        load_index(spec.format(url=server.url), key="data.train", create=False)


def test_the_index_of_remote_shards(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sidecar in (*folder.glob("*.idx"), folder / "_info.json"):
        sidecar.unlink()
    out = tmp_path / "index"
    with serving(folder) as server:
        data = f"data={server.url}/set-{{00..09}}.tar"
        assert main([data]) == 2
        assert "name a folder for their index" in capsys.readouterr().err
        assert main([data, f"out={out}", "verify=true"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert (
            lines[-1]
            == f"shards=10 indexed_now=10 indexed_before=0 damaged=0 samples={sum(LENGTHS)}"
        )
        assert "sizes HxW: 1x3 (122); 1 different" in lines
        assert any(line.startswith("double keys: 77, the first is") for line in lines)
        (sidecar,) = out.glob("set-03.tar-*.idx")
        sidecar.unlink()
        asked = dict(server.asked)
        assert main([data, f"out={out}"]) == 0  # goes on with what is missing
        again = {p for p in asked if server.asked[p] > asked[p] + 2 and p.endswith(".tar")}
        assert again <= {"set-03.tar"}
        spec = {"path": f"{server.url}/set-{{00..09}}.tar", "index": str(out)}
        index = load_index(spec, key="data.train", create=False)
        assert index.lengths.tolist() == list(LENGTHS)


def test_a_remote_index_belongs_to_its_shards(folder: Path, tmp_path: Path) -> None:
    """Other shards of the same names, or another size, are indexed anew; a damaged shard keeps
    neither its sidecar nor the list that names it; an unreachable one keeps both."""
    place, out = tmp_path / "a", tmp_path / "index"

    def made(name: str, **options: bool) -> list[int]:
        place.mkdir(exist_ok=True)
        shutil.copy(folder / name, place / "x.tar")
        url = f"file://{place}/x.tar"
        damage = write_index_of_remote([url], out, **options)
        assert set(damage.values()) <= {None}
        index = load_index({"path": url, "index": str(out)}, key="k", create=False)
        return [*index.lengths.tolist(), len(damage)]

    assert made("set-03.tar") == [30, 1]
    assert made("set-03.tar") == [30, 0]  # kept
    assert made("set-05.tar") == [45, 1]  # another size
    place = tmp_path / "b"
    assert made("set-02.tar") == [7, 1]  # another address
    url = f"file://{place}/x.tar"
    (place / "x.tar").rename(place / "away")
    (error,) = write_index_of_remote([url], out, overwrite=True).values()
    assert "no such file" in str(error) and (out / "shards.json").exists()
    data = bytearray((folder / "set-02.tar").read_bytes())
    data[1024:1100] = b"\xff" * 76
    (place / "x.tar").write_bytes(data)
    sidecars = len(list(out.glob("*.idx")))
    (error,) = write_index_of_remote([url], out, overwrite=True).values()
    assert "damaged tar header" in str(error)
    assert len(list(out.glob("*.idx"))) == sidecars - 1 and not (out / "shards.json").exists()


@pytest.mark.parametrize("status", [403, 404])
def test_what_is_forbidden_counts_as_missing(folder: Path, status: int) -> None:
    """S3 says so of what is not there, to those who may not list it."""
    with serving(folder, lambda path, n: status if path == "_info.json" else None) as server:
        index = load_index(f"{server.url}/set-{{00..09}}.tar", key="data.train", create=False)
        assert index.lengths.tolist() == list(LENGTHS)
        with pytest.raises(ConfigError, match=r"cannot be read .*name the shards"):
            load_index(server.url, key="data.train", create=False)


def test_only_the_status_says_what_is_missing(tmp_path: Path) -> None:
    """Not the digits of a name; and the answer outlives the way from a worker."""
    with serving(tmp_path, lambda path, n: 500) as server, pytest.raises(UnreadableError):
        remote.exists(f"{server.url}/train-000403.tar.idx")
    with serving(tmp_path) as server, pytest.raises(UnreadableError) as raised:
        read_range(f"{server.url}/x", 0, 1)
    again = pickle.loads(pickle.dumps(raised.value))
    assert again.is_missing and str(again) == str(raised.value)


def test_signed_addresses_name_shards(folder: Path) -> None:
    signature = "?sig=a/b.c&sv=2"
    with serving(folder, query=signature) as server:
        for spec in (f"{server.url}/set-{{00..09}}.tar{signature}", f"{server.url}/{signature}"):
            index = load_index(spec, key="data.train", create=False)
            assert index.lengths.tolist() == list(LENGTHS)
            assert (
                index.offsets(3).tolist()
                == np.fromfile(folder / "set-03.tar.idx").view("<u8").tolist()
            )
        assert index.fingerprint == load_index(str(folder), key="data", create=False).fingerprint
        (folder / "_info.json").unlink()
        spec = f"{server.url}/set-{{00..09}}.tar{signature}"
        again = load_index(spec, key="data.train", create=False)
    assert again.lengths.tolist() == index.lengths.tolist()  # nothing says what its bytes are


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
    assert not remote.exists(f"{protocol}nowhere/_info.json")
    with pytest.raises(ShardError, match="no such file"):
        read_range(f"{protocol}nowhere/a.tar", 0, 10)
    assert pauses == []


def test_a_wids_index_of_others_is_read(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.tar"))
    shards = [{"url": n, "nsamples": c} for n, c in zip(names, LENGTHS, strict=True)]
    (folder / "wids.json").write_text(json.dumps({"shardlist": shards}))
    index = load_index(str(folder / "wids.json"), key="data.train", create=False)
    assert index.lengths.tolist() == list(LENGTHS)
    shards[3]["nsamples"] = 31
    (folder / "wids.json").write_text(json.dumps({"shardlist": shards}))
    with pytest.raises(ShardError, match=r"set-03\.tar has 30 samples .* says 31"):
        load_index(str(folder / "wids.json"), key="data.train", create=False)
    (folder / "wids.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no list of shards"):
        load_index(str(folder / "wids.json"), key="data.train", create=False)


HELD_BACK = r"names .*; a file of shards may name only files beside or below it"


@pytest.mark.parametrize("field", ["url", "index"])
@pytest.mark.parametrize(
    "name",
    [
        "pipe:touch {made}",
        "file:///etc/passwd",
        "file:passwd",
        "/etc/passwd",
        "../x.tar",
        "a/../../x.tar",
        "https://elsewhere.example/x.tar",
        "s3://bucket/x.tar",
        "x.tar::file:///etc/passwd",
    ],
)
@pytest.mark.parametrize("served", [False, True])
def test_an_index_names_no_command_and_no_place_elsewhere(
    tmp_path: Path, served: bool, field: str, name: str
) -> None:
    made = tmp_path / "made"
    entry = {"url": "x.tar", "nsamples": 1, field: name.format(made=made)}
    (tmp_path / "shards.json").write_text(json.dumps({"shardlist": [entry]}))
    with serving(tmp_path) as server, pytest.raises(ConfigError, match=HELD_BACK):
        place = server.url if served else str(tmp_path)
        load_index(f"{place}/shards.json", key="data.train", create=True)
    assert not made.exists()


def test_an_index_may_name_its_own_host(folder: Path) -> None:
    with serving(folder) as server:
        entry = {"url": f"{server.url}/set-03.tar", "nsamples": 30}
        (folder / "shards.json").write_text(json.dumps({"shardlist": [entry]}))
        index = load_index(f"{server.url}/shards.json", key="data.train", create=False)
        assert index.num_samples == 30
        with pytest.raises(ConfigError, match=HELD_BACK):  # the file here has no host
            load_index(str(folder / "shards.json"), key="data.train", create=False)


def test_the_name_of_a_file_is_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:touch made; cat x.tar").touch()
    with pytest.raises(ConfigError, match="rename it"):
        load_index(".", key="data.train", create=True)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("with_index", [False, True])
def test_a_run_folder_names_no_command(tmp_path: Path, with_index: bool) -> None:
    """But the command line does: `data=`."""
    config = tiny_config()
    spec: object = f"pipe:touch {tmp_path}/made"
    config.data.validation = {"path": spec, "index": str(tmp_path)} if with_index else spec
    config.data.train = [{"path": spec, "weight": 1}]
    message = "only local paths and http"
    with pytest.raises(ConfigError, match=message):
        open_images(config, "", create=True)
    with pytest.raises(ConfigError, match=message):
        open_images(config, config.data.train, create=True, key="data.train")
    with pytest.raises(ConfigError, match="has no index"):
        open_images(config, spec, create=True)
    assert not (tmp_path / "made").exists()
