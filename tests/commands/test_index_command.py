import os

import numpy as np

from tests.data.conftest import marked_png, png
from tests.support.picture_sources import npy
from vae_dist.data.writer import write_shards
from vae_dist.index import main


def test_shards_are_indexed_and_counted_and_damage_is_named(tmp_path, capsys):
    folder = tmp_path / "set"
    write_shards(({"__key__": f"{i:03d}", "cls": b"1"} for i in range(10)), folder, num_shards=2)
    for sidecar in folder.glob("*.idx"):
        sidecar.unlink()
    for now, before in ((2, 0), (0, 2)):
        assert main([f"data={folder}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith("shard-000000.tar: samples=5 bytes=10240")
        counts = f"shards=2 indexed_now={now} indexed_before={before} damaged=0 samples=10"
        assert lines[-1] == counts and len(list(folder.glob("*.idx"))) == 2
    os.truncate(folder / "shard-000001.tar", 1024)
    assert main([f"data={folder}", "overwrite=true"]) == 1
    out, err = capsys.readouterr()
    assert "shard-000001.tar: byte 1024: the tar ends without its end mark" in err
    assert out.endswith("indexed_now=1 indexed_before=0 damaged=1 samples=5\n")
    assert main(["data=nowhere"]) == 2
    assert "data=nowhere: no such folder" in capsys.readouterr().err


def test_verify_decodes_every_sample(tmp_path, capsys):
    pixels, mask = np.zeros((3, 4), np.uint8), np.full((3, 4), 255, np.uint8)
    samples = [
        {"__key__": "a", "png": png(pixels), "mask.png": png(mask), "cls": b"cat"},
        {"__key__": "b", "npy": npy(np.full((3, 4), np.nan, np.float32))},
        {"__key__": "c", "png": marked_png(0, 1), "depth.png": png(pixels)},
    ]

    def verified(folder, *keys):
        code = main([f"data={tmp_path / folder}", "verify=true", *keys])
        return code, *capsys.readouterr()

    write_shards(samples, tmp_path / "whole", num_shards=1)
    code, out, err = verified("whole")
    assert (code, "damaged" in err) == (0, False)
    assert "sizes HxW: 3x4 (2), 1x3 (1); 2 different" in out
    assert "channels: 1 (3)" in out and out.endswith("damaged=0 samples=3\n")
    for kind in ("member", "nan"):
        assert f"incomplete: 1 samples, which data.mask={kind} reads" in out
    samples[0]["mask.png"], samples[1]["npy"] = png(mask[:2]), b"no picture\x1b[2J"
    samples[2]["features.safetensors"] = b""
    write_shards(samples, tmp_path / "damaged", num_shards=2)
    code, out, err = verified("damaged")
    assert "shard-000000.tar sample 0: its mask is 2 x 4 pixels, but the image 3 x 4" in err
    assert "shard-000001.tar sample 0: " in err and "\x1b" not in err
    assert "no features in .features.safetensors" in err
    assert code == 1 and out.endswith("damaged=2 samples=3\n")
    code, out, err = verified("whole", "image_key=depth.png")
    assert code == 1 and "sizes HxW: 3x4 (1); 1 different" in out
    assert "this one has no .depth.png" in err
