"""`pack` through its entry point, resumed too, and what its shards hold."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal

import numpy as np
import pytest

from tests.support.latent_data import samples_of
from tests.support.picture_sources import contents, decoded, encoded, opened, png, write
from vae_dist.config.errors import ConfigError
from vae_dist.data.index import load_index
from vae_dist.data.writer import ShardWriter
from vae_dist.pack import main
from vae_dist.packing.jobs import ShardJob, cut
from vae_dist.packing.pack import _digest
from vae_dist.packing.picture import KEPT

COUNT = 60


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    files = {
        f"{'cat' if i % 3 else 'dog'}/{i:03d}.png": encoded(np.full((4, 6, 3), i, np.uint8))
        for i in range(COUNT)
    }
    return write(tmp_path_factory.mktemp("in") / "pictures", files)


@pytest.fixture(scope="module")
def whole(pictures):
    assert pack(pictures, pictures.parent / "whole") == 0
    return pictures.parent / "whole"


def pack(source, out, *more):
    keys = ("shard_mb=0.03", "workers=1", "validation=0.1", *more)
    return main([f"source={source}", f"out={out}", *keys])


def pack_all(source, out, *more):
    return pack(source, out, "validation=0", "shuffle=false", "shard_mb=1", *more)


def stored(folder):
    samples = samples_of(folder)
    return [(int(decoded(sample["png"])[0, 0, 0]), int(sample["cls"])) for sample in samples]


def test_each_picture_is_packed_once(whole):
    train, validation = stored(whole / "train"), stored(whole / "validation")
    assert len(validation) == 6
    assert load_index(str(whole / "train"), key="data.train", create=False).num_samples == 54
    assert sorted(train + validation) == [(i, int(not i % 3)) for i in range(COUNT)]
    assert train != sorted(train)
    names = [line.split("\t") for line in (whole / "names.txt").read_text().splitlines()]
    packed = [int(name[2].rpartition("/")[2][:3]) for name in names]
    assert packed == [level for level, _ in train + validation]
    summary = json.loads((whole / "pack.json").read_text())
    assert summary["classes"] == ["cat", "dog"] and summary["splits"]["train"]["samples"] == 54
    assert summary["facts"] == dict.fromkeys((KEPT, "3 channels", "4 x 6 pixels"), COUNT)
    cells = decoded((whole / "contact-sheet.png").read_bytes())[2::98, 2::98, 0].ravel()
    assert cells.tolist() == [*(level for level, _ in train), 112, 112]  # two are empty
    files = {"contact-sheet.png", "names.txt", "pack.json", "train", "validation"}
    assert {path.name for path in whole.iterdir()} == files


def test_a_finished_folder_is_left_alone(pictures, whole, tmp_path, capsys):
    before = contents(whole)
    assert pack(pictures, whole) == 0
    assert "finished already" in capsys.readouterr().out
    late = ShardJob(whole, "pack.json", {}).shard("train/train-000000.tar")
    with pytest.raises(ConfigError, match=r"cannot be written .*the same command goes on"), late:
        pass
    (tmp_path / "pack.json").write_bytes(b"[" * 10**5)
    for out, key, message in (
        (whole, "validation=0.2", "other validation (0.1 there, 0.2 here)"),
        (whole / "train", "seed=0", "in use; give another folder"),
        (whole / "names.txt", "seed=0", "in use; give another folder"),
        (tmp_path, "seed=0", "pack.json: no JSON"),
    ):
        assert pack(pictures, out, key) == 2
        assert message in capsys.readouterr().err
    assert contents(whole) == before


def test_job_arrays_write_the_same_bytes(pictures, whole, tmp_path):
    for i in (1, 0):
        assert not (tmp_path / "pack.json").exists()
        assert pack(pictures, tmp_path, f"shard_range={i}/2", f"workers={i + 1}") == 0
    assert contents(tmp_path) == contents(whole)
    assert cut(7, 3, at_least=8) == [(0, 2), (2, 4), (4, 7)]
    assert cut(2, 3, at_least=8) == [(0, 1), (1, 2)]
    assert len(cut(1024, 1, at_least=8)) == 8 and len(cut(1024, 9, at_least=8)) == 9


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), ""),
        (OSError(errno.ENOSPC, "No space left"), "No space left.*the same command goes on"),
        (None, "a process .* SIGKILL.*the same command goes on"),
    ],
)
def test_what_ends_early_goes_on(error, message, pictures, whole, tmp_path, monkeypatch, capsys):
    out, write_one = tmp_path / "out", ShardWriter.write

    def write_or_end(self, sample):
        if sample["__key__"] == "000000030":
            if error is not None:
                raise error
            os.kill(os.getpid(), signal.SIGKILL)
        write_one(self, sample)

    monkeypatch.setattr(ShardWriter, "write", write_or_end)
    assert pack(pictures, out) == (2 if message else 0)
    assert re.search(message, capsys.readouterr().err)
    assert not multiprocessing.active_children()
    done = {path.name: path.stat().st_mtime_ns for path in (out / "train").glob("*.tar")}
    assert sorted(done) == ["train-000000.tar", "train-000001.tar"]
    assert len(list(out.glob(".job/*.tar.*[0-9]"))) == (error is None)  # parts of shards
    with pytest.raises(ConfigError, match=r"not finished; give it, with out=.*, again: it goes on"):
        load_index(str(out / "train"), key="data.train", create=True)
    monkeypatch.setattr(ShardWriter, "write", write_one)
    more = write(shutil.copytree(pictures, tmp_path / "more"), {"cat/001.mask.png": png()})
    files = dict(sorted(contents(pictures).items()))  # as the folder is listed
    moved = write(tmp_path / "moved.tar", files | {"cat/001.cls": b"dog"})
    split = write(tmp_path / "split/train.tar", files).parent
    for source, changed in ((pictures, "seed"), *((s, "pictures") for s in (more, moved, split))):
        assert pack(source, out, "seed=1") == 2
        assert f"other {changed}" in capsys.readouterr().err
    one = opened(pictures, tmp_path / "work")[0].items[0]
    assert _digest([one]) != _digest([one._replace(extra={"age": 1})])
    assert pack(pictures, out) == 0
    assert {name: (out / "train" / name).stat().st_mtime_ns for name in done} == done
    assert contents(out) == contents(whole)


def test_every_loss_counts_and_is_named(pictures, tmp_path, capsys):
    broken = {"cat/001.png": b"broken", "cat/empty\x1b[2J.png": b""}
    broken["dog/000.png"] = (pictures / "dog/003.png").read_bytes()[:45]
    source = write(shutil.copytree(pictures, tmp_path / "in"), broken)
    for limit in (0.01, 0.04):  # the empty one is known before anything is written
        assert pack(source, tmp_path / "out", f"max_skipped_fraction={limit}") == 2
    error = capsys.readouterr().err
    assert "1 of 61 images cannot be read" in error and "3 of 61 images" in error
    assert "max_skipped_fraction=0.01" in error and "cat/001.png: no readable picture" in error
    assert not (tmp_path / "out/pack.json").exists()
    shard = tmp_path / "out/train/train-000000.tar"  # damaged since: its sheet lacks a picture
    shard.write_bytes(shard.read_bytes().replace(b"IHDR", b"none", 1))
    assert pack(source, tmp_path / "out", "max_skipped_fraction=1") == 0
    said = capsys.readouterr().err
    assert "left out: dog/000.png: damaged PNG" in said
    assert "left out: cat/empty\\x1b[2J.png: an empty file" in said
    assert sum(len(samples_of(tmp_path / "out" / name)) for name in ("train", "validation")) == 58


def test_what_is_refused(pictures, tmp_path, capsys):
    mixed = write(tmp_path / "mixed", {"train/a.png": png(), "bus/b.png": png()})
    tests = write(tmp_path / "tests", {"test/a.png": png()})
    for source, key, message in (
        (pictures, "shard_range=3/3", "shard_range=3/3 is not i/n with 0 <= i < n"),
        (pictures, "shard_range=a/2", "shard_range=a/2 is not i/n with 0 <= i < n"),
        (pictures, "size=big", "size=big is none of"),
        (pictures, "size=[8]", "size=[8] is none of"),
        (pictures, "validation=60", "sets 60 of 60 pictures aside"),
        (pictures, "shard_mb=0", "shard_mb=0 must be more than 0"),
        (mixed, "seed=0", "1 pictures belong to a split (train/a.png: train) and 1 to none (bus/"),
        (tests, "seed=0", "pictures are of validation or test; add some to train"),
    ):
        assert main([f"source={source}", f"out={tmp_path / 'out'}", key]) == 2
        assert message in capsys.readouterr().err


def test_masks_are_packed_with_their_pictures(tmp_path, capsys):
    mask = np.full((12, 20), 255, np.uint8)
    mask[:, :10] = 0
    files = {f"{i}.heic": encoded(np.full((12, 20), 40 * i, np.uint8)) for i in range(3)}
    files |= {"1.mask.png": encoded(mask), "2.mask.png": encoded(mask[:3])}
    source, out = write(tmp_path / "in", files), tmp_path / "out"
    assert pack_all(source, out, "size=[6,10]", "max_skipped_fraction=1") == 0
    said = capsys.readouterr()
    assert "with missing pixels (set data.mask=member): 1" in said.out
    assert ".heic, decoded by content: 2" in said.out
    assert "its mask is 3 x 20 pixels, but the image 12 x 20" in said.err
    first, second = samples_of(out / "train")
    observed = decoded(second["mask.png"])
    assert "mask.png" not in first and not observed[:, :5].any() and observed[:, 7:].all()


def test_fields_of_a_tar_are_kept_and_joined_with_those_of_a_table(tmp_path, capsys):
    files = {"0.png": png(), "0.json": b'{"label":3}', "0.txt": b"a cat"}
    source, table = write(tmp_path / "in.tar", files), tmp_path / "labels.csv"
    assert pack_all(source, tmp_path / "plain") == 0
    (kept,) = samples_of(tmp_path / "plain/train")
    assert [kept[n] for n in ("png", "json", "txt")] == list(files.values())
    for age, code in ((4, 0), (4, 0), (5, 2)):  # other labels are another pack
        table.write_text(f"path,age\n0.png,{age}\n")
        assert pack_all(source, tmp_path / "joined", f"labels={table}") == code
    (joined,) = samples_of(tmp_path / "joined/train")
    assert json.loads(joined["json"]) == {"label": 3, "age": "4"}
    out, err = capsys.readouterr()
    assert "finished already" in out and "other labels" in err
