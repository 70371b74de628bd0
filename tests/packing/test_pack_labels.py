"""What `pack` writes beside the pictures: labels, masks, fields."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.picture_sources import png, write_tar
from vae_dist.data.index import load_index
from vae_dist.data.reader import SampleReader
from vae_dist.data.settings import image_settings
from vae_dist.pack import main

SHARD = "train/train-000000.tar"


def pack(source: Path, out: Path, *more: str) -> int:
    keys = ["validation=0", "workers=1", "shuffle=false"]
    return main([f"source={source}", f"out={out}", *keys, *more])


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
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
    assert pack(source, out, "size=[6,10]", "max_skipped_fraction=1") == 0
    said = capsys.readouterr()
    assert "missing pixels: 1 pictures have a .mask.png; set data.mask=member" in said.out
    assert "2.png: its mask is 3 x 20 pixels, but the picture 12 x 20" in said.err
    assert json.loads((out / "pack.json").read_text())["members"] == {"mask.png": 1}
    index = load_index(str(out / "train"), key="data.train", create=False)
    settings = image_settings(
        index, channels=1, resolution="native", max_pixels=1000, mask="member"
    )
    reader = SampleReader(index, settings, seed=0)
    images = [reader.load(data, 0, i, epoch=0)[0] for i, data in enumerate(reader.read(0, 0, 2))]
    assert images[0][1].all() and not images[1][1, :, :5].any() and images[1][1, :, 7:].all()


def test_fields_of_a_tar_are_kept_and_joined_with_those_of_a_table(tmp_path: Path) -> None:
    source, labels = tmp_path / "in.tar", tmp_path / "labels.csv"
    write_tar(source, {"0.png": png(), "0.json": b'{"label":3}', "0.txt": b"a cat"})
    assert pack(source, tmp_path / "plain") == 0
    assert members(tmp_path / "plain" / SHARD) == {
        "000000000.png": png(),
        "000000000.json": b'{"label":3}',
        "000000000.txt": b"a cat",
    }
    labels.write_text("path,age\n0.png,4\n")
    assert pack(source, tmp_path / "joined", f"labels={labels}") == 0
    fields = members(tmp_path / "joined" / SHARD)["000000000.json"]
    assert json.loads(fields) == {"label": 3, "age": "4"}


def test_other_labels_are_another_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(png())
    labels, key = tmp_path / "labels.csv", f"labels={tmp_path / 'labels.csv'}"
    labels.write_text("path,label\n0.png,1\n")
    assert pack(tmp_path / "in", tmp_path / "out", key) == 0
    assert pack(tmp_path / "in", tmp_path / "out", key) == 0
    assert "finished already" in capsys.readouterr().out
    labels.write_text("path,label\n0.png,2\n")
    for keys in ([key], []):
        assert pack(tmp_path / "in", tmp_path / "out", *keys) == 2
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
    assert pack(source, tmp_path / "out") == pack(source, tmp_path / "out") == 0
    attributes.write_text("1\nSmiling\n0.jpg -1\n")
    assert pack(source, tmp_path / "out") == 2
    assert "another labels" in capsys.readouterr().err
    shutil.rmtree(source)
    assert pack(source, tmp_path / "out") == 0
