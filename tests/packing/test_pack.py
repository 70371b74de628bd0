from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vae_dist.packing.pack as packing
from tests.support.picture_sources import png, write_tar
from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import DataConfig
from vae_dist.data.index import load_index
from vae_dist.data.reader import SampleReader
from vae_dist.data.settings import image_settings
from vae_dist.pack import main
from vae_dist.packing.items import Item, Place

COUNT = 60


def write_pictures(folder: Path, count: int = COUNT) -> None:
    for i in range(count):
        path = folder / ("cat" if i % 3 else "dog") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.fromarray(np.full((4, 6, 3), i, np.uint8)).save(file, "PNG")
        path.write_bytes(file.getvalue())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


def pack(source: Path, out: Path, *more: str) -> int:
    shards = ["shard_mb=0.03", "workers=1"]
    return main([f"source={source}", f"out={out}", *shards, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def loaded(folder: Path) -> list[tuple[int, int]]:
    """(grey level of the picture, label), as the trainer reads them."""
    index = load_index(str(folder), key="data.train", create=False)
    settings = image_settings(index, DataConfig(channels=3, resolution="native", max_pixels=1000))
    reader = SampleReader(index, settings, seed=0)
    found = []
    for shard, length in enumerate(index.lengths.tolist()):
        for i, data in enumerate(reader.read(shard, 0, length)):
            image, label = reader.load(data, shard, i, epoch=0)
            found.append((int(image[0, 0, 0]), label))
    return found


def test_the_trainer_reads_each_picture_once(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert pack(pictures, out, "validation=0.1") == 0
    train, validation = loaded(out / "train"), loaded(out / "validation")
    assert len(validation) == 6
    assert sorted(train + validation) == [(i, int(not i % 3)) for i in range(COUNT)]
    assert train != sorted(train)
    names = [line.split("\t") for line in (out / "names.txt").read_text().splitlines()]
    levels = [int(name[2].rpartition("/")[2][:3]) for name in names]
    assert levels == [level for level, _ in train + validation]
    summary = json.loads((out / "pack.json").read_text())
    assert summary["classes"] == ["cat", "dog"]
    assert summary["splits"]["train"]["kept_byte_for_byte"] == 54
    assert summary["sizes"] == {"4x6": 60}
    assert Image.open(out / "contact-sheet.png").width > 4 * 96
    assert sorted(path.name for path in out.iterdir()) == [
        "contact-sheet.png", "names.txt", "pack.json", "train", "validation"
    ]  # fmt: skip
    capsys.readouterr()
    assert pack(pictures, out, "validation=0.1") == 0
    assert "finished already" in capsys.readouterr().out
    assert pack(pictures, out, "validation=0.2") == 2
    assert "another validation (0.1 there, 0.2 here)" in capsys.readouterr().err


def test_a_killed_pack_goes_on_and_ends_the_same(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pack(pictures, tmp_path / "whole") == 0
    prepare, calls = packing.prepare, []

    def killed(*args: Any, **options: Any) -> object:
        calls.append(args)
        if len(calls) == COUNT + 25:  # the first ones measure sizes
            raise KeyboardInterrupt
        return prepare(*args, **options)

    monkeypatch.setattr(packing, "prepare", killed)
    assert pack(pictures, tmp_path / "killed") == 130
    assert 1 <= len(list((tmp_path / "killed/train").glob("*.tar"))) < 5
    assert pack(pictures, tmp_path / "killed", "seed=1") == 2
    assert "another seed (0 there, 1 here)" in capsys.readouterr().err
    before = len(calls)
    assert pack(pictures, tmp_path / "killed") == 0
    assert len(calls) - before < 2 * COUNT
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_workers_and_job_arrays_write_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    assert pack(pictures, tmp_path / "one") == 0
    for i in (1, 0):
        assert not (tmp_path / "array/pack.json").exists()
        assert pack(pictures, tmp_path / "array", f"shard_range={i}/2", f"workers={i + 1}") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "array")


def test_damaged_pictures_are_left_out_and_named(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "cat/001.png").write_bytes(b"broken")
    (pictures / "dog/000.png").write_bytes((pictures / "dog/003.png").read_bytes()[:45])
    assert pack(pictures, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "2 of 60 images cannot be read" in error and "raise max_skipped_fraction" in error
    assert "cat/001.png: no readable PNG" in error
    assert not (tmp_path / "out/pack.json").exists()
    assert pack(pictures, tmp_path / "out", "max_skipped_fraction=1") == 0
    assert "left out: dog/000.png: damaged PNG" in capsys.readouterr().err
    assert len(loaded(tmp_path / "out/train")) + len(loaded(tmp_path / "out/validation")) == 58


def test_every_loss_counts(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        (pictures / f"cat/empty{i}.png").touch()
    assert pack(pictures, tmp_path / "out") == 2
    assert "3 of 63 images cannot be read" in capsys.readouterr().err
    assert pack(pictures, tmp_path / "out", "max_skipped_fraction=0.05") == 0
    skipped = json.loads((tmp_path / "out/pack.json").read_text())["skipped"]
    assert skipped == [[f"cat/empty{i}.png", "an empty file"] for i in range(3)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("shard_range=3/3", "shard_range=3/3 is not i/n"),
        ("size=big", "size=big is none of"),
        ("size=[8]", r"size=[8] is none of"),
        ("validation=60", "sets 60 of 60 pictures aside"),
        ("quality=101", "quality=101 must be at most 100"),
        ("shard_mb=0", "shard_mb=0 must be more than 0"),
        ("source=[]", "no picture can be packed"),
    ],
)
def test_wrong_keys(
    pictures: Path, tmp_path: Path, keys: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = [] if keys.startswith("source") else [f"source={pictures}"]
    assert main([*source, f"out={tmp_path / 'out'}", keys]) == 2
    assert message in capsys.readouterr().err


ITEM = Item("a.png", Place("x"), 10, None, 3, {"age": 4})


@pytest.mark.parametrize(
    "other",
    [
        ITEM._replace(extra={"age": 5}),
        ITEM._replace(category=4),
        ITEM._replace(companions=(("mask.png", ITEM._replace(name="a.mask.png")),)),
    ],
)
def test_what_a_sample_says_is_part_of_the_plan(other: Item) -> None:
    same = ITEM._replace(place=Place("y"))
    assert packing._digest([ITEM]) == packing._digest([same]) != packing._digest([other])


def test_a_source_without_training_pictures_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="all 1 pictures are of validation or test; add some to train on"
    ):
        packing.make_plan([ITEM._replace(split="test")], PackCommand())


# what lies beside the pictures


def pack_all(source: Path, out: Path, *more: str) -> int:
    return pack(source, out, "validation=0", "shuffle=false", "shard_mb=1", *more)


def members(out: Path) -> dict[str, bytes]:
    with tarfile.open(out / "train/train-000000.tar") as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        return {name: file.read() for name, file in files.items() if file is not None}


def test_the_trainer_reads_packed_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    mask = np.full((12, 20), 255, np.uint8)
    mask[:, :10] = 0
    for i in range(3):
        Image.new("L", (20, 12), 40 * i).save(source / f"{i}.png")
    Image.fromarray(mask).save(source / "1.mask.png")
    Image.fromarray(mask[:3]).save(source / "2.mask.png")
    assert pack_all(source, out, "size=[6,10]", "max_skipped_fraction=1") == 0
    said = capsys.readouterr()
    assert "missing pixels: 1 pictures have a .mask.png; set data.mask=member" in said.out
    assert "2.png: its mask is 3 x 20 pixels, but the picture 12 x 20" in said.err
    assert json.loads((out / "pack.json").read_text())["members"] == {"mask.png": 1}
    index = load_index(str(out / "train"), key="data.train", create=False)
    settings = image_settings(
        index, DataConfig(channels=1, resolution="native", max_pixels=1000, mask="member")
    )
    reader = SampleReader(index, settings, seed=0)
    images = [reader.load(data, 0, i, epoch=0)[0] for i, data in enumerate(reader.read(0, 0, 2))]
    assert images[0][1].all() and not images[1][1, :, :5].any() and images[1][1, :, 7:].all()


def test_fields_of_a_tar_are_kept_and_joined_with_those_of_a_table(tmp_path: Path) -> None:
    source, labels = tmp_path / "in.tar", tmp_path / "labels.csv"
    write_tar(source, {"0.png": png(), "0.json": b'{"label":3}', "0.txt": b"a cat"})
    assert pack_all(source, tmp_path / "plain") == 0
    assert members(tmp_path / "plain") == {
        "000000000.png": png(),
        "000000000.json": b'{"label":3}',
        "000000000.txt": b"a cat",
    }
    labels.write_text("path,age\n0.png,4\n")
    assert pack_all(source, tmp_path / "joined", f"labels={labels}") == 0
    fields = members(tmp_path / "joined")["000000000.json"]
    assert json.loads(fields) == {"label": 3, "age": "4"}


def test_other_labels_are_another_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(png())
    labels, key = tmp_path / "labels.csv", f"labels={tmp_path / 'labels.csv'}"
    labels.write_text("path,label\n0.png,1\n")
    assert pack_all(tmp_path / "in", tmp_path / "out", key) == 0
    assert pack_all(tmp_path / "in", tmp_path / "out", key) == 0
    assert "finished already" in capsys.readouterr().out
    labels.write_text("path,label\n0.png,2\n")
    for keys in ([key], []):
        assert pack_all(tmp_path / "in", tmp_path / "out", *keys) == 2
        assert "another labels" in capsys.readouterr().err


def test_other_lists_of_celeba_are_another_pack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "0.jpg").write_bytes(png())
    (source / "list_eval_partition.txt").write_text("0.jpg 0\n")
    attributes = source / "list_attr_celeba.txt"
    attributes.write_text("1\nSmiling\n0.jpg 1\n")
    assert pack_all(source, tmp_path / "out") == pack_all(source, tmp_path / "out") == 0
    attributes.write_text("1\nSmiling\n0.jpg -1\n")
    assert pack_all(source, tmp_path / "out") == 2
    assert "another labels" in capsys.readouterr().err
    shutil.rmtree(source)
    assert pack_all(source, tmp_path / "out") == 0
