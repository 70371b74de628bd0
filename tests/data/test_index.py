"""Which shards a folder or a pattern names, their index, and what is damaged or changed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from webdataset.tariterators import base_plus_ext

from tests.data.conftest import LENGTHS, MARKED
from vae_dist.config.errors import ConfigError
from vae_dist.data.index import MAX_SAMPLE_BYTES, ShardError, load_index
from vae_dist.data.indexing import (
    NUM_PIECES,
    PIECE_BYTES,
    digest_of,
    index_shard,
    write_index,
    write_info,
)
from vae_dist.data.reader import SampleReader, single_sample
from vae_dist.data.shards import locate
from vae_dist.data.tar import DamagedSampleError, files_of_tar, key_and_suffix, sample_starts

NAMES = [f"set-{i:02d}.tar" for i in range(10)]


def load(folder: Path | str, *, create: bool = False) -> list[int]:
    return load_index(str(folder), key="data.train", create=create).lengths.tolist()


def paths(spec: object) -> list[str]:
    return [shard.path for shard in locate(spec, key="data.train")]


def test_folders_patterns_globs_and_lists_name_the_same_shards(
    shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(shards).parent))
    folder = paths(shards)
    assert [os.path.basename(p) for p in folder] == NAMES
    for spec in (
        f"{shards}/set-{{00..09}}.tar",
        [f"{shards}/set-00.tar", f"{shards}/set-{{01..09}}.tar"],
        f"{shards}/set-*.tar",
        f"{shards}/set-0[0-9].tar",
        "~/set",
        ["~/set/set-0?.tar"],
    ):
        assert paths(spec) == folder


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", r"^data\.train=nowhere: no such folder; put WebDataset shards there"),
        ("{shards}/set-{{08..17}}.tar", r"8 of 10 shards are missing: .*set-10\.tar.* and 3 more"),
        ("{shards}/set-{{08..17.tar", r"data\.train=.*set-\{08"),
        ("{shards}/other-*.tar", "file matches"),
        ("{empty}", r"the folder holds no \*\.tar file"),
        ("{shards}/set-00.tar.idx", r"a file, but no \.tar shard"),
        ("{shards}/set-00.tar", "hold no sample"),
        (7, "data.train=7 is no path"),
        ([], "names no shard"),
    ],
)
def test_wrong_specs_are_named(shards: str, tmp_path: Path, spec: object, message: str) -> None:
    if isinstance(spec, str):
        spec = spec.format(shards=shards, empty=tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_index(spec, key="data.train", create=False)


# tars


def write_tar(path: Path, names: list[str], *, tar_format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 600 * number % 1100, 1.5  # PAX puts it in an own record
            tar.addfile(member, io.BytesIO(bytes(member.size)))


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_and_offsets_are_those_of_tarfile(tmp_path: Path, tar_format: int) -> None:
    path, keys = tmp_path / "a.tar", ("x/a", "x/" + "b" * 120, "x/\u00e4", "\u00e4" * 200, "x/d")
    names = [f"{key}.{suffix}" for key in keys for suffix in ("png", "cls", "json")]
    write_tar(path, names, tar_format=tar_format)
    with tarfile.open(path) as tar:
        files = tar.getmembers()
    found = [(file.name, file.offset_data, file.size) for file in files]
    assert list(files_of_tar(str(path))) == found
    # a sample begins with the extended header of its first file, which tarfile calls its offset
    end = files[-1].offset_data + -(-files[-1].size // 512) * 512
    assert index_shard(path).tolist() == [*(file.offset for file in files[::3]), end]


METADATA = ["__meta__", "__meta__/a.json", "__meta__.json", "__MACOSX/a.png", "__a.png", "__.png"]
NAMES_OF_FILES = ["a.png", "x/y/a.seg.png", "x.y/a.png", "x.y/a", ".hidden", "x/.png", "a.", "a/"]


@pytest.mark.parametrize("name", [*METADATA, "._a.png", ".DS_Store"])
def test_samples_and_metadata_are_what_webdataset_says(tmp_path: Path, name: str) -> None:
    for place in range(3):
        names = ["a.png", "b.png"]
        names.insert(place, name)
        write_tar(path := tmp_path / f"{place}.tar", names)
        index = load_index(str(path), key="k", create=True)
        reader = SampleReader(index, MARKED, seed=0)
        found = [single_sample(d, "a.tar") for d in reader.read(0, 0, index.num_samples)]
        expected = list(wds.WebDataset(str(path), shardshuffle=False))
        shown = [(s["__key__"], s.keys() - {"__url__"}) for s in found]
        assert shown == [(s["__key__"], s.keys() - {"__url__", "__local_path__"}) for s in expected]
    for name in ("", *NAMES_OF_FILES):
        base, suffix = base_plus_ext(name)
        assert key_and_suffix(name) == (base, suffix or "")


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_sector_of_zeros_loses_no_member_in_silence(tmp_path: Path, tar_format: int) -> None:
    """Folders and links between samples are passed over; a header of zeros is damage."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        for key in ("a", "b"):
            for suffix in ("png", "cls"):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size, member.mtime = 3, 1.5
                tar.addfile(member, io.BytesIO(b"abc"))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
                member = tarfile.TarInfo("between")
                member.type, member.linkname = kind, "a.png"
                tar.addfile(member)
    (first, second), end = sample_starts(str(path))
    for sample in (path.read_bytes()[first:second], path.read_bytes()[second:end]):
        assert single_sample(sample, "a.tar").keys() == {"__key__", "__url__", "png", "cls"}
        for at in range(0, len(sample), 512):
            zeroed = sample[:at] + bytes(512) + sample[at + 512 :]
            with contextlib.suppress(DamagedSampleError):
                assert single_sample(zeroed, "a.tar").keys() >= {"png", "cls"}


def test_members_that_do_not_lie_together_are_named(tmp_path: Path) -> None:
    write_tar(path := tmp_path / "a.tar", ["a.png", "b.png", "a.cls", "b.cls"])
    with pytest.raises(ShardError, match=r"members of sample a do not .*pack source=.*a\.tar out"):
        index_shard(path)
    write_tar(path, ["a.png", "a.cls", "b.png", "a.png", "a.cls"])  # equal keys are no sample
    assert len(index_shard(path)) == 4


def header(name: str = "a.png", size: bytes = b"", kind: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124 : 124 + len(size)], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (header(size=b"\x80" + bytes(3) + b"\xff" * 8), "the tar ends inside a file"),  # base 256
        (header(size=b"\xff" * 12), "damaged tar header"),  # base 256, below zero
        (header(size=b"-0000001000"), "damaged tar header"),
        (header(size=b"00010000000\0", kind=b"L") + bytes(2**22), "an attribute of 2097152 bytes"),
        (header(size=b"00000000005\0", kind=b"x") + b"9 a=b" + bytes(507), "damaged pax header"),
        (
            header(size=b"00000000020\0", kind=b"x") + b"16 size=9999999\n" + bytes(496) + header(),
            "the tar ends inside a file",
        ),
    ],
)
def test_what_a_header_says_is_compared_with_what_is_there(
    tmp_path: Path, data: bytes, problem: str
) -> None:
    (path := tmp_path / "a.tar").write_bytes(data + bytes(1024))
    with pytest.raises(ShardError, match=problem):
        index_shard(path)
    with pytest.raises(DamagedSampleError, match=problem):
        single_sample(data, "a.tar")


# the index


def test_loading_makes_what_is_missing_and_then_reads_it(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    (copied / "set-03.tar.idx").unlink()
    with pytest.raises(ConfigError, match=r"set-03\.tar has no index; .*vae_dist\.index data="):
        load(copied)
    with monkeypatch.context() as patch:
        patch.setattr("vae_dist.data.indexing.write_durably", refuse)
        with pytest.raises(ConfigError, match=r"cannot be written .*Permission denied.*copy the s"):
            load(copied, create=True)
    after = load_index(str(copied), key="data.train", create=True)
    again = load_index(str(copied), key="data.train", create=False)
    assert after.lengths.tolist() == list(LENGTHS) and after.fingerprint == again.fingerprint
    sizes = sum(path.stat().st_size for path in copied.glob("*.tar"))
    assert after.mean_sample_bytes == pytest.approx(sizes / sum(LENGTHS))
    info = json.loads((copied / "_info.json").read_text())["splits"]["copy"]
    assert info["shard_lengths"] == list(LENGTHS) and info["num_samples"] == sum(LENGTHS)
    assert info["filenames"] == NAMES
    whole = again.offsets(5)
    assert len(whole) == LENGTHS[5] + 1
    np.testing.assert_array_equal(again.offsets(5, 10, 14), whole[10:15])


def test_what_a_folder_does_not_say_or_says_otherwise(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*, create: bool = True, shard: str = "") -> str:
        load(copied / shard, create=create)
        return capsys.readouterr().err

    info = copied / "_info.json"
    info.write_text("theirs")
    (copied / "set-03.tar.idx").unlink()
    assert not said() and info.read_text() == "theirs"
    write_info(sorted(copied.glob("*.tar")), split="train")
    assert not said()
    content = json.loads(info.read_text())
    content["splits"]["train"]["shard_lengths"][3] = 99
    info.write_text(json.dumps(content))
    message = "_info.json does not say what the sidecars of 1 shards do, the first is set-03.tar"
    assert message in said() and not said(create=False) and not said(shard="set-04.tar")
    (copied / "set-10.tar.gz").touch()
    assert "1 compressed shards are left out, the first is set-10.tar.gz" in said()

    (copied / "set-03.tar").unlink()
    with pytest.raises(ConfigError, match=r"1 of the 10 shards .* are missing: set-03\.tar; copy"):
        paths(str(copied))
    rest = paths(f"{copied}/*.tar")
    write_index(rest, overwrite=True)
    assert paths(str(copied)) == rest


def test_a_data_set_is_its_bytes(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(*, create: bool = False) -> str:
        return load_index(str(copied), key="data.train", create=create).fingerprint

    before = fingerprint()
    write_info(sorted(copied.glob("*.tar")), split="train")
    whole, shard = fingerprint(), copied / "set-05.tar"
    assert whole != before
    os.utime(shard, (4e9, 4e9))  # younger than the index, but the same
    assert fingerprint() == whole
    data = bytearray(shard.read_bytes())
    data[int(index_shard(shard)[3]) + 600] ^= 1
    shard.write_bytes(data)
    os.utime(shard, (4e9, 4e9))
    changed = fingerprint(create=True)
    assert changed != whole
    os.utime(shard, (1e9, 1e9))
    os.utime(copied / "_info.json", (2e9, 2e9))
    assert fingerprint() == whole, "the index is believed where it is younger"
    info = json.loads((copied / "_info.json").read_text())
    del info["splits"]["train"]["shard_digests"]  # of an earlier version
    (copied / "_info.json").write_text(json.dumps(info))
    assert fingerprint() == before
    (copied / "_info.json").unlink()
    (copied / "set-09.tar").unlink()
    assert fingerprint() != before


def test_digests_that_were_right_are_taken_anew_once(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def counted(paths: list[str]) -> list[str]:
        taken.extend(paths)
        return [digest_of(path, os.path.getsize(path)) for path in paths]

    write_info(sorted(copied.glob("*.tar")), split="train")
    os.utime(copied / "_info.json", (1e9, 1e9))
    monkeypatch.setattr("vae_dist.data.index.digests_of", counted)
    for create, shard, count in ((True, "set-05.tar", 1), (True, "", 10), (False, "", 0)):
        load(copied / shard, create=create)
        assert len(taken) == count
        taken.clear()


def test_the_digest_of_a_large_shard_is_of_pieces(tmp_path: Path) -> None:
    path, size = tmp_path / "large.tar", 2 * NUM_PIECES * PIECE_BYTES
    path.write_bytes(bytes(size))
    before = digest_of(str(path), size)
    for at in (0, size - 1):
        path.write_bytes(bytes(at) + b"1" + bytes(size - at - 1))
        assert digest_of(str(path), size) != before


# damage


def test_damage_is_reported_with_its_byte(copied: Path) -> None:
    whole = {name: (copied / name).read_bytes() for name in NAMES}
    end = int(index_shard(copied / "set-05.tar")[-1])
    at = int(index_shard(copied / "set-05.tar")[20])
    cases = {
        "set-03.tar": (whole["set-03.tar"][:10340], "byte 10240: the tar ends inside a header"),
        "set-05.tar": (whole["set-05.tar"][:10240], "byte 10240: the tar ends without its end"),
        "set-06.tar": (
            whole["set-06.tar"][:7168] + b"\xff" * 512 + whole["set-06.tar"][7680:],
            "byte 7168: damaged tar header",
        ),
    }
    for name, (data, _) in cases.items():
        (copied / name).write_bytes(data)
    damage = write_index(paths(str(copied)), overwrite=True)
    found = {os.path.basename(path): str(error) for path, error in damage.items() if error}
    assert found.keys() == cases.keys() and not (copied / "set-05.tar.idx").exists()
    assert all(problem in found[name] for name, (_, problem) in cases.items())
    with pytest.raises(ShardError, match=r"byte 10240: .*copy the shard again"):
        load(copied, create=True)
    path, data = copied / "set-05.tar", whole["set-05.tar"]
    path.write_bytes(data[:at] + bytes(512) + data[at + 512 :])
    with pytest.raises(ShardError, match=f"byte {at}: a block of zeros where a header should be"):
        index_shard(path)
    for mark in (512, 1024):  # end marks of one block and of two
        path.write_bytes(data[: end + mark])
        assert index_shard(path)[-1] == end


def resized(by: int) -> Callable[[Path], None]:
    return lambda sidecar: os.truncate(sidecar, max(0, sidecar.stat().st_size + by))


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: shutil.copy(s.with_name("set-03.tar"), s.with_suffix("")),  # another shard
        lambda s: shutil.copy(s.with_name("set-09.tar.idx"), s),
        resized(-24),
        resized(-3),
        resized(-(10**6)),
    ],
)
def test_a_sidecar_that_does_not_fit_is_refused(
    copied: Path, damage: Callable[[Path], object]
) -> None:
    damage(copied / "set-05.tar.idx")
    with pytest.raises(ShardError, match=r"set-05\.tar\.idx does not fit .*overwrite=true"):
        load(copied, create=True)


def test_offsets_that_cannot_be_are_refused(copied: Path) -> None:
    offsets = np.fromfile(copied / "set-05.tar.idx", "<u8")
    index = load_index(str(copied), key="data.train", create=False)
    for value in (0, 2**63 + 5, 2**64 - 1, MAX_SAMPLE_BYTES + 2**33):
        offsets[7] = value
        offsets.tofile(copied / "set-05.tar.idx")
        for stop in (7, 9):
            with pytest.raises(ShardError, match=f"offsets 5 to {stop} are damaged"):
                index.offsets(5, 5, stop)
