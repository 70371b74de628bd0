from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vae_dist.packing.pack as packing
from vae_dist.data.index import load_index
from vae_dist.data.reader import SampleReader
from vae_dist.data.settings import image_settings
from vae_dist.pack import main

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


@pytest.fixture
def few(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "few", 6)
    return tmp_path / "few"


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
    settings = image_settings(index, channels=3, resolution="native", max_pixels=1000)
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
    assert pack(pictures, tmp_path / "two", "workers=2") == 0
    for i in (1, 0, 2):
        assert not (tmp_path / "array/pack.json").exists()
        assert pack(pictures, tmp_path / "array", f"shard_range={i}/3") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "array")


def test_damaged_pictures_are_left_out_and_named(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "cat/001.png").write_bytes(b"broken")
    (pictures / "dog/000.png").write_bytes((pictures / "dog/003.png").read_bytes()[:45])
    assert pack(pictures, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "2 of 60 pictures cannot be packed" in error and "max_skipped_fraction=1" in error
    assert "cat/001.png: no readable PNG" in error
    assert not (tmp_path / "out/pack.json").exists()
    assert pack(pictures, tmp_path / "out", "max_skipped_fraction=1") == 0
    assert "left out: dog/000.png: damaged PNG" in capsys.readouterr().err
    assert len(loaded(tmp_path / "out/train")) + len(loaded(tmp_path / "out/validation")) == 58


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["shard_range=3/3"], "shard_range=3/3 is not i/n"),
        (["size=big"], "size=big is none of"),
        (["validation=60"], "sets 60 of 60 pictures aside"),
        (["quality=101"], "quality=101 must be at most 100"),
        (["shard_mb=0"], "shard_mb=0 must be more than 0"),
    ],
)
def test_wrong_keys(
    pictures: Path,
    tmp_path: Path,
    keys: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([f"source={pictures}", f"out={tmp_path / 'out'}", *keys]) == 2
    assert message in capsys.readouterr().err
