"""`impute` through its entry point: what it writes, and what it leaves as it was."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny_run import random_pixels
from vae_dist.impute import main

SIZE = (12, 10)  # of the images of `conditional_run`
PIXELS = random_pixels(6, *SIZE)


def impute(run, out, *keys):
    assert main([f"run={run}", f"out={out}", "device=cpu", *keys]) == 0
    return json.loads((out / "imputed.json").read_text())["images"]


def array(out, record, name):
    return np.load(out / record["folder"] / f"{name}.npy")


def save(pixels, path):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.mark.parametrize("method", ["importance", "gibbs", "single"])
def test_observed_pixels_stay_and_missing_ones_are_filled(conditional_run, tmp_path, method):
    out, keys = tmp_path / "out", ("draws=3", "num_images=3", f"method={method}")
    records = impute(conditional_run, out, *keys, *(["samples=40"] * (method != "single")))
    assert [record["key"] for record in records] == ["0000", "0001", "0002"]
    for record, truth in zip(records, PIXELS, strict=False):
        mean, std, draws = (array(out, record, name) for name in ("mean", "std", "draws"))
        assert mean.shape == std.shape == (1, *SIZE) and draws.shape == (3, 1, *SIZE)
        if method == "single":
            assert (mean == draws[0]).all()
        kept = mean[0] == truth
        halves = [kept[:, :5], kept[:, 5:], kept[:6], kept[6:]]
        assert any(half.all() for half in halves) and kept.mean() < 0.55
        assert (std[0][kept] == 0).sum() >= kept.size / 2 and record["missing_fraction"] == 0.5
        assert (draws[:, 0][:, kept] == truth[kept]).all()
        assert mean.min() >= 0 and mean.max() <= 255
        pictures = {path.stem: path for path in (out / record["folder"]).glob("*.png")}
        assert set(pictures) == {"input", "mean", "std", "draw_0", "draw_1", "draw_2"}
        png, spread = (np.asarray(Image.open(pictures[name])) for name in ("mean", "std"))
        assert (png[kept] == truth[kept]).all() and (np.abs(png - mean[0]) <= 0.51).all()
        assert (np.abs(spread - 2 * std[0]) <= 0.51).all()  # white is half the range
    # truth, input, mean, three draws, deviation, each of 10x12 pixels enlarged eight times
    assert Image.open(out / "overview.png").size == (7 * 82 + 2, 3 * 98 + 2)


def test_pictures_with_masks_or_alpha(conditional_run, tmp_path, capsys, monkeypatch):
    first, second = PIXELS[:2]
    observed = np.ones(SIZE, bool)
    observed[2:9, 3:8] = False
    save(first, tmp_path / "masks" / "a cat.png")
    save(255 * observed, tmp_path / "masks" / "a cat.mask.png")
    (tmp_path / "masks" / "b.png").write_bytes(b"")
    save(second, tmp_path / "masks" / "whole.png")
    save(np.stack([first, 255 * observed], 2), tmp_path / "alpha" / "a cat.png")
    found = []
    for name in ("masks", "alpha"):
        out = tmp_path / f"{name}-out"
        records = impute(conditional_run, out, f"data={tmp_path / name}", "samples=40")
        assert records[0]["key"] == "a cat"
        found.append(array(out, records[0], "mean")[0])
        assert (found[-1][observed] == first[observed]).all()
    np.testing.assert_allclose(*found, rtol=1e-4)
    (whole,) = (tmp_path / "masks-out").glob("*-whole/mean.npy")
    assert (np.load(whole)[0] == second).all()
    assert "1 images are left out; the first: b: " in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "masks")  # without data=, the images are those of the run
    records = impute(conditional_run, tmp_path / "own", "num_images=2", "samples=40")
    assert [record["missing_fraction"] for record in records] == [0.5, 0.5]


def test_what_impute_refuses(conditional_run, spatial_run, tmp_path, capsys):
    save(PIXELS[0], tmp_path / "whole" / "cat.png")
    for key, reason in (("out", "not empty"), ("data", "whole is missing: give pictures a")):
        keys = (f"out={tmp_path}/new", f"{key}={tmp_path}/whole")
        assert main([f"run={conditional_run}", "device=cpu", *keys]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    keys = ("mask=rectangle", "mask_fraction=0.25", "num_images=2", "samples=40")
    records = impute(spatial_run, tmp_path / "new", *keys)
    assert all(abs(record["missing_fraction"] - 0.25) < 0.05 for record in records)
