"""Jobs that write shards: resumable, by any number of processes, without locks; and `pack`, through
its entry point, with what the trainer reads of its shards."""

import errno
import json
import multiprocessing
import os
import signal
from functools import partial

import numpy as np
import pytest
from PIL import Image

import vae_dist.packing.pack as packing
from tests.support.latent_data import samples_of
from tests.support.picture_sources import contents, encoded, png, write
from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import DataConfig
from vae_dist.data.index import load_index, write_info
from vae_dist.data.reader import SampleReader
from vae_dist.data.settings import image_settings
from vae_dist.pack import main
from vae_dist.packing import jobs
from vae_dist.packing.items import Item, Place
from vae_dist.packing.jobs import ShardJob, cut, run
from vae_dist.packing.picture import KEPT

PLAN = {"seed": 0, "pictures": "a digest"}
SHARDS = [f"s-{k:06d}.tar" for k in range(6)]


def write_shard(job, name):
    with job.shard(name) as (writer, report):
        for i in range(3):
            writer.write({"__key__": f"{i}", "txt": f"{name} {i}".encode()})
        report["samples"] = 3


def run_all(write, workers):
    run(write, SHARDS, workers=workers, progress=lambda done: None)


def complete(job):
    write_info([job.out / name for name in SHARDS], split="s")
    job.finish({"samples": sum(job.report(name)["samples"] for name in SHARDS)})


def begun(out):
    job = ShardJob(out, "done.json", PLAN)
    assert not job.is_finished()
    job.begin()
    return job


@pytest.fixture
def job(tmp_path):
    return begun(tmp_path / "out")


def test_a_job_is_shards_index_and_summary(job):
    for name in SHARDS:
        write_shard(job, name)
    complete(job)
    assert json.loads((job.out / "done.json").read_text()) == {"samples": 18, "identity": PLAN}
    assert job.is_finished() and not job.work.exists()
    assert load_index(str(job.out), key="data", create=False).num_samples == 18
    with pytest.raises(ConfigError, match=r"out=.*: made with another seed \(0 there, 1 here\)"):
        ShardJob(job.out, "done.json", {**PLAN, "seed": 1}).is_finished()
    with pytest.raises(ConfigError, match=r"cannot be written .*the same command goes on"):
        write_shard(job, SHARDS[4])  # one who comes late
    (job.out / "done.json").write_bytes(b"[" * 10**5)
    with pytest.raises(ConfigError, match=r"done\.json: no JSON"):
        job.is_finished()
    for out in (job.out, job.out / "done.json"):
        with pytest.raises(ConfigError, match="in use; give another folder"):
            ShardJob(out, "other.json", PLAN).is_finished()


def test_a_shard_that_ends_early_is_not_there(job):
    write_shard(job, SHARDS[0])
    with pytest.raises(KeyboardInterrupt), job.shard(SHARDS[1]) as (writer, _):
        writer.write({"__key__": "0", "txt": b"x"})
        raise KeyboardInterrupt
    assert [name for name in SHARDS if job.is_done(name)] == SHARDS[:1]
    assert not list(job.work.glob("*.tar.*[0-9]"))
    with pytest.raises(ConfigError, match=r"not finished; give it, with out=.*, again: it goes on"):
        load_index(str(job.out), key="data.train", create=True)
    with pytest.raises(ConfigError, match="made with another pictures"):
        ShardJob(job.out, "done.json", {**PLAN, "pictures": "others"}).begin()


def test_parts_in_any_order_write_the_same_bytes(tmp_path):
    for out, parts in (("one", [(0, 1)]), ("three", [(2, 3), (0, 3), (1, 3)])):
        for i, n in parts:
            job = begun(tmp_path / out)
            run(partial(write_shard, job), SHARDS[i::n], workers=2, progress=lambda done: None)
        complete(job)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert cut(7, 3, at_least=8) == [(0, 2), (2, 4), (4, 7)]
    assert cut(2, 3, at_least=8) == [(0, 1), (1, 2)]
    assert len(cut(1024, 1, at_least=8)) == 8 and len(cut(1024, 9, at_least=8)) == 9


def test_what_the_disk_refuses_and_killed_processes_are_said_once(job, monkeypatch):
    def write_or_die(name):
        if name == SHARDS[3]:
            os.kill(os.getpid(), signal.SIGKILL)
        write_shard(job, name)

    with pytest.raises(ConfigError, match=r"a process .* SIGKILL.*the same command goes on"):
        run_all(write_or_die, 2)
    assert not multiprocessing.active_children()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "write_sidecar", full)
    for workers in (1, 2):
        with pytest.raises(ConfigError, match=r"No space left.*the same command goes on"):
            run_all(partial(write_shard, job), workers)
    assert not job.is_done(SHARDS[3]) and not multiprocessing.active_children()


COUNT = 60


@pytest.fixture
def pictures(tmp_path):
    files = {
        f"{'cat' if i % 3 else 'dog'}/{i:03d}.png": encoded(np.full((4, 6, 3), i, np.uint8))
        for i in range(COUNT)
    }
    return write(tmp_path / "pictures", files)


def pack(source, out, *more):
    return main([f"source={source}", f"out={out}", "shard_mb=0.03", "workers=1", *more])


def pack_all(source, out, *more):
    return pack(source, out, "validation=0", "shuffle=false", "shard_mb=1", *more)


def loaded(folder, **keys):
    """Images and labels, as the trainer reads them."""
    index = load_index(str(folder), key="data.train", create=False)
    config = DataConfig(**{"channels": 3, "resolution": "native", "max_pixels": 1000, **keys})
    reader = SampleReader(index, image_settings(index, config), seed=0)
    return [
        reader.load(data, run.shard, i, epoch=0)[:2]
        for run in reader.in_order(0, index.num_samples)
        for i, data in enumerate(reader.read([run]), run.start)
    ]


def levels(folder):
    return [(int(image[0, 0, 0]), label) for image, label in loaded(folder)]


def test_the_trainer_reads_each_picture_once(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert pack(pictures, out, "validation=0.1") == 0
    train, validation = levels(out / "train"), levels(out / "validation")
    assert len(validation) == 6
    assert sorted(train + validation) == [(i, int(not i % 3)) for i in range(COUNT)]
    assert train != sorted(train)
    names = [line.split("\t") for line in (out / "names.txt").read_text().splitlines()]
    packed = [int(name[2].rpartition("/")[2][:3]) for name in names]
    assert packed == [level for level, _ in train + validation]
    summary = json.loads((out / "pack.json").read_text())
    assert summary["classes"] == ["cat", "dog"] and summary["splits"]["train"]["samples"] == 54
    assert summary["facts"] == dict.fromkeys((KEPT, "3 channels", "4 x 6 pixels"), COUNT)
    assert Image.open(out / "contact-sheet.png").width > 4 * 96
    files = {"contact-sheet.png", "names.txt", "pack.json", "train", "validation"}
    assert {path.name for path in out.iterdir()} == files
    capsys.readouterr()
    assert pack(pictures, out, "validation=0.1") == 0
    assert "finished already" in capsys.readouterr().out
    assert pack(pictures, out, "validation=0.2") == 2
    assert "another validation (0.1 there, 0.2 here)" in capsys.readouterr().err


def test_kills_workers_and_job_arrays_write_the_same_bytes(pictures, tmp_path, monkeypatch):
    assert pack(pictures, tmp_path / "whole") == 0
    for i in (1, 0):
        assert not (tmp_path / "array/pack.json").exists()
        assert pack(pictures, tmp_path / "array", f"shard_range={i}/2", f"workers={i + 1}") == 0
    write_one, tars = packing._write_shard, tmp_path / "killed/train"

    def write_or_stop(*others):
        if others[-1].endswith("2.tar"):
            raise KeyboardInterrupt
        write_one(*others)

    monkeypatch.setattr(packing, "_write_shard", write_or_stop)
    assert pack(pictures, tmp_path / "killed") == 0  # a process that is interrupted says nothing
    whole = {path.name: path.stat().st_mtime_ns for path in tars.glob("*.tar")}
    assert len(whole) == 2 and not (tmp_path / "killed/pack.json").exists()
    monkeypatch.setattr(packing, "_write_shard", write_one)
    assert pack(pictures, tmp_path / "killed", "seed=1") == 2
    assert pack(pictures, tmp_path / "killed") == 0
    assert {name: (tars / name).stat().st_mtime_ns for name in whole} == whole
    for out in ("array", "killed"):
        assert contents(tmp_path / out) == contents(tmp_path / "whole")


def test_every_loss_counts_and_is_named(pictures, tmp_path, capsys):
    (pictures / "cat/001.png").write_bytes(b"broken")
    (pictures / "dog/000.png").write_bytes((pictures / "dog/003.png").read_bytes()[:45])
    (pictures / "cat/empty\x1b[2J.png").touch()
    for limit in (0.01, 0.04):  # the empty one is known before anything is written
        assert pack(pictures, tmp_path / "out", f"max_skipped_fraction={limit}") == 2
    error = capsys.readouterr().err
    assert "1 of 61 images cannot be read" in error and "3 of 61 images" in error
    assert "max_skipped_fraction=0.01" in error and "cat/001.png: no readable picture" in error
    assert not (tmp_path / "out/pack.json").exists()
    assert pack(pictures, tmp_path / "out", "max_skipped_fraction=1") == 0
    said = capsys.readouterr().err
    assert "left out: dog/000.png: damaged PNG" in said
    assert "left out: cat/empty\\x1b[2J.png: an empty file" in said
    assert len(levels(tmp_path / "out/train")) + len(levels(tmp_path / "out/validation")) == 58


def test_wrong_keys(pictures, tmp_path, capsys):
    for keys, message in (
        ("shard_range=3/3", "shard_range=3/3 is not i/n with 0 <= i < n"),
        ("shard_range=a/2", "shard_range=a/2 is not i/n with 0 <= i < n"),
        ("size=big", "size=big is none of"),
        ("size=[8]", r"size=[8] is none of"),
        ("validation=60", "sets 60 of 60 pictures aside"),
        ("quality=101", "quality=101 must be at most 100"),
        ("shard_mb=0", "shard_mb=0 must be more than 0"),
    ):
        assert main([f"source={pictures}", f"out={tmp_path / 'out'}", keys]) == 2
        assert message in capsys.readouterr().err


def test_what_a_sample_says_is_part_of_the_plan():
    item = Item("a.png", Place("x", 0, 10), None, 3, {"age": 4})
    same, mask = item._replace(place=Place("y", 7, 10)), item._replace(name="a.mask.png")
    for keys in ({"extra": {"age": 5}}, {"category": 4}, {"companions": (("mask.png", mask),)}):
        other = item._replace(**keys)
        assert packing._digest([item]) == packing._digest([same]) != packing._digest([other])
    with pytest.raises(ConfigError, match="pictures are of validation or test; add some to train"):
        packing.make_plan([item._replace(split="test")], PackCommand())


def test_the_trainer_reads_packed_masks(tmp_path, capsys):
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
    images = [image for image, _ in loaded(out / "train", channels=1, mask="member")]
    assert images[0][1].all() and not images[1][1, :, :5].any() and images[1][1, :, 7:].all()


def test_fields_of_a_tar_are_kept_and_joined_with_those_of_a_table(tmp_path):
    files = {"0.png": png(), "0.json": b'{"label":3}', "0.txt": b"a cat"}
    source, labels = write(tmp_path / "in.tar", files), tmp_path / "labels.csv"
    assert pack_all(source, tmp_path / "plain") == 0
    (kept,) = samples_of(tmp_path / "plain/train")
    assert [kept[n] for n in ("png", "json", "txt")] == list(files.values())
    labels.write_text("path,age\n0.png,4\n")
    assert pack_all(source, tmp_path / "joined", f"labels={labels}") == 0
    (joined,) = samples_of(tmp_path / "joined/train")
    assert json.loads(joined["json"]) == {"label": 3, "age": "4"}


def test_other_labels_are_another_pack(tmp_path, capsys):
    source, table = write(tmp_path / "in", {"0.jpg": png()}), tmp_path / "labels.csv"
    for label, code in ((1, 0), (1, 0), (2, 2)):
        table.write_text(f"path,label\n0.jpg,{label}\n")
        assert pack_all(source, tmp_path / "out", f"labels={table}") == code
    out, err = capsys.readouterr()
    assert "finished already" in out and "another labels" in err
