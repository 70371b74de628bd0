from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import marked_png, png
from vae_dist.data.writer import write_shards
from vae_dist.index import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    samples = ({"__key__": f"{i:03d}", "cls": b"1"} for i in range(10))
    write_shards(samples, tmp_path / "set", num_shards=2)
    for sidecar in (tmp_path / "set").glob("*.idx"):
        sidecar.unlink()
    return tmp_path / "set"


def test_shards_are_indexed_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"data={folder}"]) == 0
    assert sorted(p.name for p in folder.glob("*.idx")) == [
        "shard-000000.tar.idx",
        "shard-000001.tar.idx",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("shard-000000.tar: samples=5 bytes=10240")
    assert lines[-1] == "shards=2 indexed_now=2 indexed_before=0 damaged=0 samples=10"
    assert main([f"data={folder}"]) == 0
    assert capsys.readouterr().out.endswith("indexed_now=0 indexed_before=2 damaged=0 samples=10\n")


def test_a_damaged_shard_is_named_and_fails_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(folder / "shard-000001.tar", 1024)
    assert main([f"data={folder}", "overwrite=true"]) == 1
    out, err = capsys.readouterr()
    assert "shard-000001.tar: byte 1024: the tar ends without its end mark" in err
    assert out.endswith("indexed_now=1 indexed_before=0 damaged=1 samples=5\n")


def test_verify_decodes_every_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [{"__key__": f"{i:03d}", "png": marked_png(0, i)} for i in range(6)]
    samples[4]["png"] = b"no picture"
    write_shards(samples, tmp_path / "set", num_shards=2)
    assert main([f"data={tmp_path / 'set'}", "verify=true"]) == 1
    out, err = capsys.readouterr()
    assert "shard-000000.tar sample 2: no readable PNG" in err
    assert "sizes HxW: 1x3 (5); 1 different" in out and "channels: 1 (5)" in out
    assert out.endswith("damaged=1 samples=6\n")


def test_verify_reads_incomplete_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels, mask = np.zeros((3, 4), np.uint8), np.full((3, 4), 255, np.uint8)
    pixels_with_nan = np.full((3, 4), np.nan, np.float32)
    np.save(array := io.BytesIO(), pixels_with_nan)
    samples = [
        {"__key__": "a", "png": png(pixels), "mask.png": png(mask)},
        {"__key__": "b", "npy": array.getvalue()},
        {"__key__": "c", "png": png(pixels)},
    ]
    write_shards(samples, tmp_path / "whole", num_shards=1)
    assert main([f"data={tmp_path / 'whole'}", "verify=true"]) == 0
    out, err = capsys.readouterr()
    assert "damaged" not in err and "sizes HxW: 3x4 (3); 1 different" in out
    assert "incomplete: 1 samples, which data.mask=member reads" in out
    assert "incomplete: 1 samples, which data.mask=nan reads" in out
    samples[0]["mask.png"], samples[2]["mask.png"] = png(mask[:2]), b"no picture"
    write_shards(samples, tmp_path / "damaged", num_shards=1)
    assert main([f"data={tmp_path / 'damaged'}", "verify=true"]) == 1
    err = capsys.readouterr().err
    assert "sample 0: its mask is 2 x 4 pixels, but the image 3 x 4" in err
    assert "sample 2: no readable PNG" in err


def test_verify_reads_the_image_that_was_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"png": png(np.zeros((2, 2), np.uint8)), "depth.png": png(np.zeros((3, 4), np.uint8))}
    write_shards([{"__key__": "a", **both, "cls": b"cat"}], tmp_path / "set", num_shards=1)
    for options, size in (([], "2x2"), (["image_key=depth.png"], "3x4")):
        assert main([f"data={tmp_path / 'set'}", "verify=true", *options]) == 0
        assert f"sizes HxW: {size} (1); 1 different" in capsys.readouterr().out


def test_wrong_keys_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data=nowhere"]) == 2
    assert "data=nowhere: no such folder" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "overwrite=false" in capsys.readouterr().out
