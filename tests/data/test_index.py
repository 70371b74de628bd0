from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from webdataset.tariterators import base_plus_ext

from tests.data.conftest import LENGTHS
from vae_dist.config.errors import ConfigError
from vae_dist.data.index import ShardError, load_index, resolve_shards
from vae_dist.data.indexing import (
    NUM_PIECES,
    PIECE_BYTES,
    digest_of,
    index_shard,
    write_index,
    write_info,
)
from vae_dist.data.reader import SampleReader, single_sample
from vae_dist.data.tar import DamagedSampleError, key_and_suffix, sample_starts
from vae_dist.data.transforms import ImageSettings


@pytest.fixture
def copied(shards: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def test_folder_brace_pattern_and_list_name_the_same_shards(shards: str) -> None:
    folder = resolve_shards(shards, key="data.train")
    assert [os.path.basename(p) for p in folder] == [f"set-{i:02d}.tar" for i in range(10)]
    assert resolve_shards(f"{shards}/set-{{00..09}}.tar", key="data.train") == folder
    parts = [f"{shards}/set-00.tar", f"{shards}/set-{{01..09}}.tar"]
    assert resolve_shards(parts, key="data.train") == folder


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", r"^data\.train=nowhere: no such folder; put WebDataset shards there"),
        ("{shards}/set-{{08..17}}.tar", r"8 of 10 shards are missing: .*set-10\.tar.* and 3 more"),
        ("{shards}/set-{{08..17.tar", r"data\.train=.*set-\{08"),
        ("{empty}", r"the folder holds no \*\.tar file"),
        ("{shards}/set-00.tar.idx", r"a file, but no \.tar shard"),
        (7, "data.train=7 is no path"),
        ([], "names no shard"),
    ],
)
def test_wrong_specs_are_named(shards: str, tmp_path: Path, spec: object, message: str) -> None:
    if isinstance(spec, str):
        spec = spec.format(shards=shards, empty=tmp_path)
    with pytest.raises(ConfigError, match=message):
        resolve_shards(spec, key="data.train")


def write_foreign_tar(path: Path, tar_format: int) -> None:
    """A tar of `tarfile` itself: folders, long and umlaut names, a sample of three files."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        folder = tarfile.TarInfo("pictures")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for key in ("pictures/a", "pictures/" + "b" * 120, "pictures/\u00e4", "pictures/d"):
            for suffix, size in (("png", 700), ("cls", 1), ("json", 512)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size, member.mtime = size, 1.5  # PAX puts this into a record of its own
                tar.addfile(member, fileobj=Zeros())


class Zeros:
    def read(self, count: int) -> bytes:
        return bytes(count)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_are_those_of_tarfile(tmp_path: Path, tar_format: int) -> None:
    path = tmp_path / "foreign.tar"
    write_foreign_tar(path, tar_format)
    with tarfile.open(path) as tar:
        files = [member for member in tar if member.isreg()]
    # a sample begins with the extended header of its first file, which tarfile calls its offset
    starts = [member.offset for member in files if member.name.endswith(".png")]
    end = files[-1].offset_data + 512
    assert index_shard(path).tolist() == [*starts, end]


def write_files(path: Path, *names: str) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))


METADATA = ["__meta__", "__meta__/a.json", "__meta__.json", "__MACOSX/a.png", "__a.png", "__.png"]


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_metadata_is_what_webdataset_says(tmp_path: Path, name: str, place: int) -> None:
    names = ["a.png", "b.png"]
    names.insert(place, name)
    write_files(path := tmp_path / "a.tar", *names)
    index = load_index(str(path), key="k", create=True)
    reader = SampleReader(index, ImageSettings(1, (1, 1), True, 10), seed=0)
    found = [single_sample(d, "a.tar") for d in reader.read(0, 0, index.num_samples)]
    expected = list(wds.WebDataset(str(path), shardshuffle=False))
    assert [s.keys() - {"__url__"} for s in found] == [
        s.keys() - {"__url__", "__local_path__"} for s in expected
    ]
    assert [s["__key__"] for s in found] == [s["__key__"] for s in expected]


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


def test_loading_makes_what_is_missing_and_then_reads_it(copied: Path) -> None:
    before = load_index(str(copied), key="data.train", create=False)
    (copied / "set-03.tar.idx").unlink()
    with pytest.raises(ConfigError, match=r"set-03\.tar has no index; .*vae_dist\.index data="):
        load_index(str(copied), key="data.train", create=False)
    after = load_index(str(copied), key="data.train", create=True)
    assert after.lengths.tolist() == list(LENGTHS) == before.lengths.tolist()
    again = load_index(str(copied), key="data.train", create=False)
    assert after.fingerprint == again.fingerprint
    assert after.num_samples == sum(LENGTHS)
    sizes = sum(path.stat().st_size for path in copied.glob("*.tar"))
    assert after.mean_sample_bytes == pytest.approx(sizes / sum(LENGTHS))
    info = json.loads((copied / "_info.json").read_text())["splits"]["copy"]
    assert info["shard_lengths"] == list(LENGTHS) and info["num_samples"] == sum(LENGTHS)
    assert info["filenames"] == [f"set-{i:02d}.tar" for i in range(10)]


def test_an_info_file_of_others_is_kept(copied: Path) -> None:
    (copied / "_info.json").write_text("theirs")
    (copied / "set-03.tar.idx").unlink()
    load_index(str(copied), key="data.train", create=True)
    assert (copied / "_info.json").read_text() == "theirs"


def test_an_info_file_that_says_otherwise_is_named(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_info(sorted(copied.glob("*.tar")), split="train")
    load_index(str(copied), key="data.train", create=True)
    assert not capsys.readouterr().err
    info = json.loads((copied / "_info.json").read_text())
    info["splits"]["train"]["shard_lengths"][3] = 99
    (copied / "_info.json").write_text(json.dumps(info))
    load_index(str(copied / "set-04.tar"), key="data.train", create=True)
    assert not capsys.readouterr().err
    load_index(str(copied), key="data.train", create=True)
    message = "_info.json does not say what the sidecars of 1 shards do, the first is set-03.tar"
    assert message in capsys.readouterr().err
    load_index(str(copied), key="data.train", create=False)  # as all other ranks do
    assert not capsys.readouterr().err


def test_a_shard_that_the_folder_lists_is_not_left_out_in_silence(copied: Path) -> None:
    write_info(sorted(copied.glob("*.tar")), split="train")
    (copied / "set-03.tar").unlink()
    with pytest.raises(ConfigError, match=r"1 of the 10 shards .* are missing: set-03\.tar; copy"):
        resolve_shards(str(copied), key="data.train")
    rest = resolve_shards(f"{copied}/*.tar", key="data.train")
    write_index(rest, overwrite=True)
    assert resolve_shards(str(copied), key="data.train") == rest


def test_fingerprint_tells_data_sets_apart(copied: Path) -> None:
    whole = load_index(str(copied), key="data.train", create=False)
    (copied / "set-09.tar").unlink()
    fewer = load_index(str(copied), key="data.train", create=False)
    assert whole.fingerprint != fewer.fingerprint


def test_a_data_set_is_its_bytes(copied: Path) -> None:
    def fingerprint(folder: Path = copied) -> str:
        return load_index(str(folder), key="data.train", create=False).fingerprint

    before = fingerprint()
    write_info(sorted(copied.glob("*.tar")), split="train")
    whole, shard = fingerprint(), copied / "set-05.tar"
    assert whole != before
    shard.write_bytes(shard.read_bytes())  # younger than the index, but the same
    assert fingerprint() == whole
    data = bytearray(shard.read_bytes())
    data[int(index_shard(shard)[3]) + 600] ^= 1
    shard.write_bytes(data)
    os.utime(shard, (4e9, 4e9))
    assert fingerprint() != whole
    info = json.loads((copied / "_info.json").read_text())
    del info["splits"]["train"]["shard_digests"]  # of an earlier version
    (copied / "_info.json").write_text(json.dumps(info))
    assert fingerprint() == before


def test_the_digest_of_a_large_shard_is_of_pieces(tmp_path: Path) -> None:
    path = tmp_path / "large.tar"
    size = 2 * NUM_PIECES * PIECE_BYTES
    path.write_bytes(bytes(size))
    before = digest_of(str(path), size)
    for at in (0, size - 1):
        path.write_bytes(bytes(at) + b"1" + bytes(size - at - 1))
        assert digest_of(str(path), size) != before


def test_parts_of_the_offsets(shards: str) -> None:
    index = load_index(shards, key="data.train", create=False)
    whole = index.offsets(5)
    assert len(whole) == LENGTHS[5] + 1
    np.testing.assert_array_equal(index.offsets(5, 10, 14), whole[10:15])


def cut(path: Path, count: int) -> None:
    os.truncate(path, count)


def overwrite(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 100)


def test_damage_is_reported_with_its_byte(copied: Path) -> None:
    cut(copied / "set-03.tar", 5 * 2048 + 100)
    cut(copied / "set-05.tar", 5 * 2048)
    overwrite(copied / "set-06.tar", 3 * 2048 + 1024)
    paths = resolve_shards(str(copied), key="data.train")
    damage = {
        os.path.basename(path): str(error)
        for path, error in write_index(paths, overwrite=True).items()
        if error is not None
    }
    assert damage.keys() == {"set-03.tar", "set-05.tar", "set-06.tar"}
    assert "byte 10240: the tar ends inside a header" in damage["set-03.tar"]
    assert "byte 10240: the tar ends without its end mark" in damage["set-05.tar"]
    assert "byte 7168: damaged tar header" in damage["set-06.tar"]
    assert not (copied / "set-05.tar.idx").exists()
    with pytest.raises(ShardError, match=r"byte 10240: .*copy the shard again"):
        load_index(str(copied), key="data.train", create=True)


def test_a_header_of_zeros_is_not_the_end_of_a_shard(copied: Path) -> None:
    path = copied / "set-05.tar"
    whole, shard = path.read_bytes(), index_shard(path)
    at = int(shard[20])
    path.write_bytes(whole[:at] + bytes(512) + whole[at + 512 :])
    with pytest.raises(ShardError, match=f"byte {at}: a block of zeros where a header should be"):
        index_shard(path)
    assert shard[-1] + 1024 <= len(whole)
    for end in (512, 1024):  # end marks of one block and of two
        path.write_bytes(whole[: shard[-1] + end])
        assert index_shard(path).tolist() == shard.tolist()


def test_a_sidecar_that_does_not_fit_is_refused(copied: Path) -> None:
    message = r"set-05\.tar\.idx does not fit .*overwrite=true"
    shutil.copy(copied / "set-03.tar", copied / "set-05.tar")
    with pytest.raises(ShardError, match=message):  # shorter than the index says
        load_index(str(copied), key="data.train", create=True)
    shutil.copy(copied / "set-05.tar.idx", copied / "set-03.tar.idx")
    shutil.copy(copied / "set-09.tar.idx", copied / "set-05.tar.idx")
    with pytest.raises(ShardError, match=r"set-03\.tar\.idx does not fit"):
        load_index(str(copied), key="data.train", create=True)


def test_a_sidecar_that_ends_too_early_is_refused(copied: Path) -> None:
    offsets = np.fromfile(copied / "set-05.tar.idx", "<u8")
    offsets[:-3].tofile(copied / "set-05.tar.idx")
    with pytest.raises(ShardError, match=r"set-05\.tar\.idx does not fit"):
        load_index(str(copied), key="data.train", create=False)


def test_offsets_that_do_not_rise_are_refused(copied: Path) -> None:
    offsets = np.fromfile(copied / "set-05.tar.idx", "<u8")
    offsets[7] = 0
    offsets.tofile(copied / "set-05.tar.idx")
    index = load_index(str(copied), key="data.train", create=False)
    with pytest.raises(ShardError, match="offsets 5 to 9 are damaged"):
        index.offsets(5, 5, 9)


def test_a_folder_that_cannot_be_written(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "set-03.tar.idx").unlink()

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("vae_dist.data.indexing.write_durably", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written .*Permission denied.*copy the sh"):
        load_index(str(copied), key="data.train", create=True)


def test_shards_without_a_sample_are_refused(copied: Path) -> None:
    with pytest.raises(ConfigError, match="hold no sample"):
        load_index(str(copied / "set-00.tar"), key="data.train", create=False)


@pytest.mark.parametrize(
    "name", ["a.png", "x/y/a.seg.png", "x.y/a.png", "x.y/a", ".hidden", "x/.png", "a.", "", "a/"]
)
def test_keys_and_suffixes_are_those_of_webdataset(name: str) -> None:
    base, suffix = base_plus_ext(name)
    assert key_and_suffix(name) == (base, suffix or "")


def test_globs_and_the_home_folder(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(shards).parent))
    whole = load_index(shards, key="data.train", create=False)
    for spec in (f"{shards}/set-*.tar", f"{shards}/set-0[0-9].tar", "~/set", ["~/set/set-0?.tar"]):
        assert load_index(spec, key="data.train", create=False).paths == whole.paths
    with pytest.raises(ConfigError, match="file matches"):
        load_index(f"{shards}/other-*.tar", key="data.train", create=False)


def test_compressed_shards_beside_plain_ones_are_named(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "set-10.tar.gz").touch()
    load_index(str(copied), key="data.train", create=True)
    assert "1 compressed shards are left out, the first is set-10.tar.gz" in capsys.readouterr().err
