"""Which shards a folder or a pattern names, their index, and what is damaged or changed."""

import contextlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import webdataset as wds

from tests.data.conftest import LENGTHS, MARKED, load, marked_png, png, refused, written
from tests.support.picture_sources import npy
from vae_dist.data import index
from vae_dist.data.index import Run, index_shard, write_index
from vae_dist.data.reader import SampleReader, single_sample
from vae_dist.data.shards import locate
from vae_dist.data.tar import DamagedSampleError, ShardError, files_of_tar
from vae_dist.index import main

NAMES = [f"set-{i:02d}.tar" for i in range(10)]


def paths(spec):
    return [shard.path for shard in locate(spec, key="data.train")]


def test_folders_patterns_globs_and_lists_name_the_same_shards(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(shards).parent))
    for spec in (
        shards,
        f"{shards}/set-{{00..09}}.tar",
        [f"{shards}/set-00.tar", f"{shards}/set-{{01..09}}.tar"],
        f"{shards}/set-0[0-9].tar",
        ["~/set/set-0?.tar"],
    ):
        assert paths(spec) == [f"{shards}/{name}" for name in NAMES]


def test_wrong_specs_are_named(shards, tmp_path):
    for spec, message in (
        ("nowhere", r"^data\.train=nowhere: no such folder; point it at WebDataset shards"),
        (f"{shards}/set-{{08..17}}.tar", r"8 of 10 shards are missing: .*set-10\.tar.* and 3 more"),
        (f"{shards}/set-{{08..17.tar", r"data\.train=.*set-\{08"),
        (f"{shards}/other-*.tar", "file matches"),
        (tmp_path, r"the folder holds no \*\.tar file"),
        (f"{shards}/set-00.tar.idx", r"a file, but no \.tar shard"),
        (f"{shards}/set-00.tar", "hold no sample"),
        (7, "data.train=7 is no path"),
        ([], "names no shard"),
    ):
        refused(spec, message)


def write_tar(path, names, tar_format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 600 * number % 1100, 1.5  # PAX puts it in an own record
            tar.addfile(member, io.BytesIO(bytes(member.size)))


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_and_offsets_are_those_of_tarfile(tmp_path, tar_format):
    path, keys = tmp_path / "a.tar", ("x/a", "x/" + "b" * 120, "x/\u00e4", "\u00e4" * 200, "x/d")
    names = [f"{key}.{suffix}" for key in keys for suffix in ("png", "cls", "json")]
    write_tar(path, names, tar_format)
    with tarfile.open(path) as tar:
        files = tar.getmembers()
    assert list(files_of_tar(str(path))) == [(f.name, f.offset_data, f.size) for f in files]
    # a sample begins with the extended header of its first file, which tarfile calls its offset
    end = files[-1].offset_data + -(-files[-1].size // 512) * 512
    assert index_shard(path).tolist() == [*(file.offset for file in files[::3]), end]


ODD = ["__meta__", "__meta__/a.json", "__meta__.json", "__MACOSX/a.png", "__a.png", "__.png"]
ODD += ["._a.png", ".DS_Store", "../../evil.png", "/evil.png", f"{'x/' * 60}a.png"]
ODD += ["x/y/a.seg.png", "x.y/a.png", "x.y/a", ".hidden", "x/.png", "a."]


def test_samples_and_metadata_are_what_webdataset_says(tmp_path):
    names = [name for i, odd in enumerate(ODD) for name in (odd, f"{i}.png")]
    write_tar(path := tmp_path / "a.tar", [*names, "__meta__"])
    reader = SampleReader(load(path, create=True), MARKED, seed=0)
    samples = reader.read(reader.in_order(0, reader.index.num_samples))
    found = [single_sample(data, "a.tar") for data in samples]
    expected = list(wds.WebDataset(str(path), shardshuffle=False))
    shown = [(s["__key__"], s.keys() - {"__url__"}) for s in found]
    assert shown == [(s["__key__"], s.keys() - {"__url__", "__local_path__"}) for s in expected]


def test_a_sector_of_zeros_loses_no_member_in_silence(tmp_path):
    write_tar(path := tmp_path / "a.tar", ["a.png", "a.cls", "a.json"], tarfile.PAX_FORMAT)
    sample = path.read_bytes()[: index_shard(path)[-1]]
    for at in range(0, len(sample), 512):
        zeroed = sample[:at] + bytes(512) + sample[at + 512 :]
        with contextlib.suppress(DamagedSampleError):
            assert single_sample(zeroed, "a.tar").keys() >= {"png", "cls", "json"}


def test_members_that_do_not_lie_together_are_named(tmp_path):
    write_tar(path := tmp_path / "a.tar", ["a.png", "b.png", "a.cls", "b.cls"])
    with pytest.raises(ShardError, match=r"members of sample a do not .*pack source=.*a\.tar out"):
        index_shard(path)
    write_tar(path, ["a.png", "a.cls", "b.png", "a.png", "a.cls"])  # equal keys are no sample
    assert len(index_shard(path)) == 4


def header(size, kind=b"0"):
    block = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT))
    block[124 : 124 + len(size)], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_what_a_header_says_is_compared_with_what_is_there(tmp_path):
    path, large = tmp_path / "a.tar", b"16 size=9999999\n" + bytes(496) + header(b"")
    for data, problem in (
        (header(b"\x80" + bytes(3) + b"\xff" * 8), "the tar ends inside a file"),  # base 256
        (header(b"", b"x") + header(b"-0000001000"), "damaged tar header"),  # of no attribute
        (header(b"\xff" * 12), "damaged tar header"),  # base 256, below zero
        (header(b"00010000000\0", b"L") + bytes(2**22), "an attribute of 2097152 bytes"),
        (header(b"00010000000\0", b"x"), "the tar ends inside a file"),
        (header(b"00000000005\0", b"x") + b"9 a=b" + bytes(507), "damaged pax header"),
        (header(b"00000000005\0", b"x") + b"0 a=b" + bytes(507), "damaged pax header"),
        (header(b"00000000005\0", b"x") + bytes(512), "attribute of zeros"),
        (header(b"00000000005\0", b"L") + bytes(512), "name or an attribute of zeros"),
        (header(b"00000000020\0", b"x") + large, "the tar ends inside a file"),
    ):
        path.write_bytes(data + bytes(1024))
        with pytest.raises(ShardError, match=problem):
            index_shard(path)
        with pytest.raises(DamagedSampleError, match=problem):
            single_sample(data, "a.tar")


def test_missing_sidecars_are_made_counted_and_read(copied, monkeypatch, capsys):
    for sidecar in copied.glob("*.idx"):
        sidecar.unlink()
    refused(copied, r"set-00\.tar has no index; .*vae_dist\.index data=")
    with monkeypatch.context() as patch:
        refusal = Mock(side_effect=PermissionError(13, "Permission denied"))
        patch.setattr(index, "write_durably", refusal)
        refused(copied, r"cannot be written .*Permission denied.*copy the s", create=True)
    for now, before in ((10, 0), (0, 10)):
        assert main([f"data={copied}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[2].endswith("set-02.tar: samples=7 bytes=20480")
        counts = f"indexed_now={now} indexed_before={before} damaged=0 samples={sum(LENGTHS)}"
        assert lines[-1] == f"shards=10 {counts}"
    info = json.loads((copied / "_info.json").read_text())["splits"]["copy"]
    assert info["shard_lengths"] == list(LENGTHS) and info["filenames"] == NAMES
    assert info["num_samples"] == sum(LENGTHS)
    loaded, sizes = load(copied), [path.stat().st_size for path in copied.glob("*.tar")]
    assert loaded.lengths.tolist() == list(LENGTHS)
    assert loaded.mean_sample_bytes == sum(sizes) / sum(LENGTHS)
    whole, part = loaded.offsets([Run(5, 0, 45), Run(5, 10, 14)])
    assert len(whole) == LENGTHS[5] + 1 and (part == whole[10:15]).all()
    os.truncate(copied / "set-05.tar", 1024)
    assert main([f"data={copied}", "overwrite=true"]) == 1
    out, err = capsys.readouterr()
    assert "set-05.tar: byte 1024: the tar ends without its end mark" in err
    assert out.endswith("indexed_now=9 indexed_before=0 damaged=1 samples=77\n")
    assert main(["data=nowhere"]) == 2
    assert "data=nowhere: no such folder" in capsys.readouterr().err


def test_what_a_folder_does_not_say_or_says_otherwise(folder, capsys):
    info = folder / "_info.json"
    load(folder, create=True)
    assert not capsys.readouterr().err
    (folder / "set-10.tar.gz").touch()
    load(folder)
    assert "compressed shards are left out (set-10.tar.gz)" in capsys.readouterr().err
    (folder / "set-03.tar").unlink()
    refused(folder, r"1 of the 10 shards .* are missing: set-03\.tar; copy")
    rest = paths(f"{folder}/*.tar")
    write_index(rest, overwrite=True)
    assert paths(str(folder)) == rest
    info.write_text("theirs")
    load(folder, create=True)
    assert info.read_text() == "theirs"


def test_a_data_set_is_its_bytes_whose_digests_are_taken_anew_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "digests_of", taken := Mock(wraps=index.digests_of))
    whole, shard, info = load(folder).fingerprint, folder / "set-05.tar", folder / "_info.json"
    os.utime(info, (1e9, 1e9))  # the shards are younger, but the same
    for create, spec, count in ((True, shard, 1), (True, folder, 10), (False, folder, 0)):
        load(spec, create=create)
        assert len(taken.call_args.args[0]) == count
    data = bytearray(shard.read_bytes())
    data[int(index_shard(shard)[3]) + 600] ^= 1
    shard.write_bytes(data)
    os.utime(info, (1e9, 1e9))
    for _ in range(2):
        assert load(folder, create=True).fingerprint != whole
    os.utime(shard, (1e8, 1e8))
    assert load(folder).fingerprint == whole, "the index is believed where it is younger"
    content = json.loads(info.read_text())
    del content["splits"]["train"]["shard_digests"]  # of an earlier version
    info.write_text(json.dumps(content))
    without = load(folder).fingerprint
    (folder / "set-09.tar").unlink()
    assert len({whole, without, load(f"{folder}/*.tar").fingerprint}) == 3
    path, size = tmp_path / "large.tar", 2 * index.NUM_PIECES * index.PIECE_BYTES
    for at in (0, size - 1):
        path.write_bytes(bytes(size))
        before = index.digest_of(str(path), size)
        path.write_bytes(bytes(at) + b"1" + bytes(size - at - 1))
        assert index.digest_of(str(path), size) != before


def test_damage_is_reported_with_its_byte(copied):
    path, end = copied / "set-05.tar", int(index_shard(copied / "set-05.tar")[-1])
    whole, at = path.read_bytes(), int(index_shard(path)[20])
    path.with_name("set-05.tar.idx").unlink()
    for data, problem in (
        (whole[: at + 100], "the tar ends inside a header"),
        (whole[:at], "the tar ends without its end mark, it is cut off; copy the shard again"),
        (whole[:at] + b"\xff" * 512 + whole[at + 512 :], "damaged tar header"),
        (whole[:at] + bytes(512) + whole[at + 512 :], "a block of zeros where a header should be"),
    ):
        path.write_bytes(data)
        refused(copied, f"set-05.tar: byte {at}: {problem}", create=True)
    for mark in (512, 1024):  # end marks of one block and of two
        path.write_bytes(whole[: end + mark])
        assert index_shard(path)[-1] == end


def test_a_sidecar_that_does_not_fit_or_offsets_that_cannot_be_are_refused(copied):
    sidecar, misfit = copied / "set-05.tar.idx", r"set-05\.tar\.idx does not fit .*overwrite=true"
    whole, loaded = sidecar.read_bytes(), load(copied)
    for data in ((copied / "set-09.tar.idx").read_bytes(), whole[:-24], whole[:-3], b""):
        sidecar.write_bytes(data)
        refused(copied, misfit, create=True)
    sidecar.write_bytes(whole)
    shutil.copy(copied / "set-03.tar", copied / "set-05.tar")
    refused(copied, misfit, create=True)
    offsets = np.frombuffer(whole, "<u8").copy()
    for value in (0, 2**30, 2**63 + 5, 2**64 - 1, index.MAX_SAMPLE_BYTES + 2**33):
        offsets[7] = value
        offsets.tofile(sidecar)
        for stop in (7, 9):
            with pytest.raises(ShardError, match=f"offsets 5 to {stop} are damaged"):
                loaded.offsets([Run(5, 5, stop)])


def test_verify_decodes_every_sample(tmp_path, capsys):
    pixels = png(np.zeros((3, 4), np.uint8))
    samples = [
        {"png": pixels, "mask.png": pixels, "cls": b"cat"},
        {"npy": npy(np.full((3, 4), np.nan, np.float32))},
        {"png": marked_png(0, 1), "depth.png": pixels},
        {"png": pixels, "mask.png": marked_png(0, 1)},
        {"png": b"no picture\x1b[2J"},
        {"png": pixels, "features.safetensors": b""},
    ]
    written(folder := tmp_path / "set", samples)
    assert main([f"data={folder}", "verify=true"]) == 1
    out, err = capsys.readouterr()
    assert "sizes HxW: 3x4 (2), 1x3 (1); 2 different" in out
    assert "channels: 1 (3)" in out and out.endswith("damaged=1 samples=6\n")
    for kind in ("member", "nan"):
        assert f"incomplete: 1 samples, which data.mask={kind} reads" in out
    assert "shard-000000.tar sample 3: its mask is 1 x 3 pixels, but the image 3 x 4" in err
    assert "sample 4: " in err and "\x1b" not in err
    assert "sample 5: no features in .features.safetensors" in err
    assert main([f"data={folder}", "verify=true", "image_key=depth.png"]) == 1
    out, err = capsys.readouterr()
    assert "sizes HxW: 3x4 (1); 1 different" in out and "this one has no .depth.png" in err
