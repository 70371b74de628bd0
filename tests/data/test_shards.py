"""Shards that lie elsewhere: what names them, their index, and what a list may not name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.data.conftest import LENGTHS
from tests.support.http_shards import serving
from tests.support.tiny_run import tiny_config
from vae_dist.config.errors import ConfigError
from vae_dist.data.index import load_index
from vae_dist.data.indexing import write_index_of_remote
from vae_dist.data.sources import UnreadableError
from vae_dist.index import main
from vae_dist.inference.load import open_images

pytestmark = pytest.mark.usefixtures("pauses")


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


@pytest.mark.parametrize("status", [403, 404, 500])
def test_what_is_forbidden_counts_as_missing(folder: Path, status: int) -> None:
    """S3 says so of what is not there, to those who may not list it. Only the status says so."""
    (folder / "_info.json").rename(folder / "other.json")
    with serving(folder, lambda path, n: status if path == "_info.json" else None) as server:
        spec = f"{server.url}/set-{{00..09}}.tar"
        if status == 500:
            with pytest.raises(UnreadableError, match="HTTP 500"):
                load_index(spec, key="data.train", create=False)
        else:
            index = load_index(spec, key="data.train", create=False)
            assert index.lengths.tolist() == list(LENGTHS)
        with pytest.raises(ConfigError, match=r"cannot be read .*name the shards"):
            load_index(server.url, key="data.train", create=False)


def test_signed_addresses_name_shards(folder: Path) -> None:
    signature = "?sig=a/b.c&sv=2"
    here = load_index(str(folder), key="data", create=False)
    with serving(folder, query=signature) as server:
        pattern, whole = f"{server.url}/set-{{00..09}}.tar{signature}", f"{server.url}/{signature}"
        for spec in (pattern, whole):
            index = load_index(spec, key="data.train", create=False)
            assert index.fingerprint == here.fingerprint
            assert index.offsets(3).tolist() == here.offsets(3).tolist()
        (folder / "_info.json").unlink()
        again = load_index(pattern, key="data.train", create=False)
    assert again.lengths.tolist() == list(LENGTHS)


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
        counts = f"shards=10 indexed_now=10 indexed_before=0 damaged=0 samples={sum(LENGTHS)}"
        assert lines[-1] == counts and "sizes HxW: 1x3 (122); 1 different" in lines
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

    def made(name: str) -> list[int]:
        place.mkdir(exist_ok=True)
        shutil.copy(folder / name, place / "x.tar")
        url = f"file://{place}/x.tar"
        damage = write_index_of_remote([url], out)
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


def test_a_wids_index_of_others_is_read(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.tar"))
    shards = [{"url": n, "nsamples": c} for n, c in zip(names, LENGTHS, strict=True)]
    for content, message in (
        ({"shardlist": shards}, ""),
        ({"shardlist": [{**shards[3], "nsamples": 31}]}, r"set-03\.tar has 30 samples .* says 31"),
        ([], "is no list of shards"),
        ({"shardlist": [{"url": "set-03.tar", "nsamples": -1}]}, "is no list of shards"),
        ({"shardlist": [{"url": "set-03.tar", "nsamples": 10**30}]}, "is no list of shards"),
    ):
        (folder / "wids.json").write_text(json.dumps(content))
        if message:
            with pytest.raises(ConfigError, match=message):
                load_index(str(folder / "wids.json"), key="data.train", create=False)
        else:
            index = load_index(str(folder / "wids.json"), key="data.train", create=False)
            assert index.lengths.tolist() == list(LENGTHS)


HELD_BACK = r"names .*; a file of shards may name only files beside or below it"
ELSEWHERE = [
    "pipe:touch {made}",
    "file:///etc/passwd",
    "file:passwd",
    "/etc/passwd",
    "../x.tar",
    "a/../../x.tar",
    "https://elsewhere.example/x.tar",
    "s3://bucket/x.tar",
    "x.tar::file:///etc/passwd",
]


@pytest.mark.parametrize("served", [False, True])
def test_an_index_names_no_command_and_no_place_elsewhere(tmp_path: Path, served: bool) -> None:
    made = tmp_path / "made"
    with serving(tmp_path) as server:
        place = server.url if served else str(tmp_path)
        for name in ELSEWHERE:
            for field in ("url", "index"):
                entry = {"url": "x.tar", "nsamples": 1, field: name.format(made=made)}
                (tmp_path / "shards.json").write_text(json.dumps({"shardlist": [entry]}))
                with pytest.raises(ConfigError, match=HELD_BACK):
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


def test_names_of_files_and_run_folders_name_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the command line does: `data=`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:touch made; cat x.tar").touch()
    with pytest.raises(ConfigError, match="rename it"):
        load_index(".", key="data.train", create=True)
    config, command = tiny_config(), "pipe:touch made"
    for spec in (command, {"path": command, "index": "."}, {"path": "x", "index": command}):
        config.data.validation, config.data.train = spec, [{"path": spec, "weight": 1}]
        with pytest.raises(ConfigError, match="only local paths and http"):
            open_images(config, "", create=True)
        with pytest.raises(ConfigError, match="only local paths and http"):
            open_images(config, config.data.train, create=True, key="data.train")
    with pytest.raises(ConfigError, match="has no index"):
        open_images(config, command, create=True)
    assert not (tmp_path / "made").exists()
