from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vae_dist.packing.pack as packing
from tests.support.picture_sources import encoded, png, write
from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import DataConfig
from vae_dist.data.index import load_index
from vae_dist.data.reader import SampleReader
from vae_dist.data.settings import image_settings
from vae_dist.pack import main
from vae_dist.packing.items import Item, Place

COUNT = 60


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    files = {
        f"{'cat' if i % 3 else 'dog'}/{i:03d}.png": encoded(np.full((4, 6, 3), i, np.uint8))
        for i in range(COUNT)
    }
    return write(tmp_path / "pictures", files)


def pack(source: Path, out: Path, *more: str) -> int:
    return main([f"source={source}", f"out={out}", "shard_mb=0.03", "workers=1", *more])


def pack_all(source: Path, out: Path, *more: str) -> int:
    return pack(source, out, "validation=0", "shuffle=false", "shard_mb=1", *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def loaded(folder: Path, **keys: Any) -> list[tuple[np.ndarray, int]]:
    """Images and labels, as the trainer reads them."""
    index = load_index(str(folder), key="data.train", create=False)
    config = DataConfig(**{"channels": 3, "resolution": "native", "max_pixels": 1000, **keys})
    reader = SampleReader(index, image_settings(index, config), seed=0)
    return [
        (image, label)
        for shard, length in enumerate(index.lengths.tolist())
        for i, data in enumerate(reader.read(shard, 0, length))
        for image, label in [reader.load(data, shard, i, epoch=0)]
    ]


def levels(folder: Path) -> list[tuple[int, int]]:
    return [(int(image[0, 0, 0]), label) for image, label in loaded(folder)]


def members(out: Path) -> dict[str, bytes]:
    with tarfile.open(out / "train/train-000000.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_the_trainer_reads_each_picture_once(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert summary["classes"] == ["cat", "dog"] and summary["sizes"] == {"4x6": 60}
    assert summary["splits"]["train"]["kept_byte_for_byte"] == 54
    assert Image.open(out / "contact-sheet.png").width > 4 * 96
    files = {"contact-sheet.png", "names.txt", "pack.json", "train", "validation"}
    assert {path.name for path in out.iterdir()} == files
    capsys.readouterr()
    assert pack(pictures, out, "validation=0.1") == 0
    assert "finished already" in capsys.readouterr().out
    assert pack(pictures, out, "validation=0.2") == 2
    assert "another validation (0.1 there, 0.2 here)" in capsys.readouterr().err


def test_kills_workers_and_job_arrays_write_the_same_bytes(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pack(pictures, tmp_path / "whole") == 0
    for i in (1, 0):
        assert not (tmp_path / "array/pack.json").exists()
        assert pack(pictures, tmp_path / "array", f"shard_range={i}/2", f"workers={i + 1}") == 0
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
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "array") == contents(tmp_path / "killed") == whole


def test_every_loss_counts_and_is_named(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "cat/001.png").write_bytes(b"broken")
    (pictures / "dog/000.png").write_bytes((pictures / "dog/003.png").read_bytes()[:45])
    (pictures / "cat/empty\x1b[2J.png").touch()
    for limit in (0.01, 0.04):  # the empty one is known before anything is written
        assert pack(pictures, tmp_path / "out", f"max_skipped_fraction={limit}") == 2
    error = capsys.readouterr().err
    assert "1 of 61 images cannot be read" in error and "3 of 61 images" in error
    assert "raise max_skipped_fraction" in error and "cat/001.png: no readable PNG" in error
    assert not (tmp_path / "out/pack.json").exists()
    assert pack(pictures, tmp_path / "out", "max_skipped_fraction=1") == 0
    said = capsys.readouterr().err
    assert "left out: dog/000.png: damaged PNG" in said
    assert "left out: cat/empty\\x1b[2J.png: an empty file" in said
    assert len(levels(tmp_path / "out/train")) + len(levels(tmp_path / "out/validation")) == 58


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("shard_range=3/3", "shard_range=3/3 is not i/n with 0 <= i < n"),
        ("shard_range=a/2", "shard_range=a/2 is not i/n with 0 <= i < n"),
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
    with pytest.raises(ConfigError, match="pictures are of validation or test; add some to train"):
        packing.make_plan([ITEM._replace(split="test")], PackCommand())


# what lies beside the pictures


def test_the_trainer_reads_packed_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.full((12, 20), 255, np.uint8)
    mask[:, :10] = 0
    files = {f"{i}.png": encoded(np.full((12, 20), 40 * i, np.uint8)) for i in range(3)}
    files |= {"1.mask.png": encoded(mask), "2.mask.png": encoded(mask[:3])}
    source, out = write(tmp_path / "in", files), tmp_path / "out"
    assert pack_all(source, out, "size=[6,10]", "max_skipped_fraction=1") == 0
    said = capsys.readouterr()
    assert "missing pixels: 1 pictures have a .mask.png; set data.mask=member" in said.out
    assert "its mask is 3 x 20 pixels, but the image 12 x 20" in said.err
    assert json.loads((out / "pack.json").read_text())["members"] == {"mask.png": 1}
    images = [image for image, _ in loaded(out / "train", channels=1, mask="member")]
    assert images[0][1].all() and not images[1][1, :, :5].any() and images[1][1, :, 7:].all()


def test_fields_of_a_tar_are_kept_and_joined_with_those_of_a_table(tmp_path: Path) -> None:
    files = {"0.png": png(), "0.json": b'{"label":3}', "0.txt": b"a cat"}
    source, labels = write(tmp_path / "in.tar", files), tmp_path / "labels.csv"
    assert pack_all(source, tmp_path / "plain") == 0
    assert members(tmp_path / "plain") == {f"00000000{n}": data for n, data in files.items()}
    labels.write_text("path,age\n0.png,4\n")
    assert pack_all(source, tmp_path / "joined", f"labels={labels}") == 0
    fields = members(tmp_path / "joined")["000000000.json"]
    assert json.loads(fields) == {"label": 3, "age": "4"}


@pytest.mark.parametrize("kind", ["csv", "celeba"])
def test_other_labels_are_another_pack(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, table, keys = write(tmp_path / "in", {"0.jpg": png()}), tmp_path / "labels.csv", []
    texts = [f"path,label\n0.jpg,{n}\n" for n in (1, 2)]
    if kind == "csv":
        keys = [f"labels={table}"]
    else:
        (source / "list_eval_partition.txt").write_text("0.jpg 0\n")
        table, texts = source / "list_attr_celeba.txt", ["1\nA B\n0.jpg 1 1", "1\nA B\n0.jpg 1 -1"]
    table.write_text(texts[0])
    assert pack_all(source, tmp_path / "out", *keys) == 0
    assert pack_all(source, tmp_path / "out", *keys) == 0
    assert "finished already" in capsys.readouterr().out
    table.write_text(texts[1])
    assert pack_all(source, tmp_path / "out", *keys) == 2
    assert "another labels" in capsys.readouterr().err
    if kind == "celeba":
        shutil.rmtree(source)  # the lists are gone with the source
        assert pack_all(source, tmp_path / "out") == 0
