"""`impute` through its entry point: what it writes, and what it leaves as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny_run import random_pixels
from vae_dist.impute import main

SIZE = (12, 10)  # of the images of `conditional_run`
PIXELS = random_pixels(6, *SIZE)
Printed = pytest.CaptureFixture[str]


def impute(run: Path, out: Path, *keys: str) -> list[dict[str, Any]]:
    assert main([f"run={run}", f"out={out}", "device=cpu", *keys]) == 0
    found: list[dict[str, Any]] = json.loads((out / "imputed.json").read_text())["images"]
    return found


def array(out: Path, record: dict[str, Any], name: str) -> np.ndarray:
    found: np.ndarray = np.load(out / record["folder"] / f"{name}.npy")
    return found


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.mark.parametrize("method", ["importance", "gibbs", "single"])
def test_observed_pixels_stay_and_missing_ones_are_filled(
    conditional_run: Path, tmp_path: Path, method: str
) -> None:
    out, keys = tmp_path / "out", ("draws=3", "num_images=3", f"method={method}")
    records = impute(conditional_run, out, *keys, *(["samples=40"] * (method != "single")))
    assert [record["key"] for record in records] == ["0000", "0001", "0002"]
    for record, truth in zip(records, PIXELS, strict=False):
        mean, std, draws = (array(out, record, name) for name in ("mean", "std", "draws"))
        assert mean.shape == std.shape == (1, *SIZE) and draws.shape == (3, 1, *SIZE)
        assert record["missing_fraction"] == 0.5
        if method == "single":
            assert (mean == draws[0]).all()
        kept = mean[0] == truth
        assert kept.mean() == pytest.approx(0.5, abs=0.05)
        halves = [kept[:, :5], kept[:, 5:], kept[:6], kept[6:]]
        (observed,) = (half for half in halves if half.all())
        assert (std[0][kept] == 0).sum() >= observed.size
        assert (draws[:, 0][:, kept] == truth[kept]).all()
        assert ((mean >= 0) & (mean <= 255)).all()
        folder = out / record["folder"]
        names = {"input", "mean", "std", "draw_0", "draw_1", "draw_2"}
        assert {path.stem for path in folder.glob("*.png")} == names
        png = np.asarray(Image.open(folder / "mean.png"))
        assert (png[kept] == truth[kept]).all() and (np.abs(png - mean[0]) <= 0.51).all()
    columns, rows, factor = 7, 3, 96 // 12  # truth, input, mean, three draws, deviation
    size = columns * (10 * factor + 2) + 2, rows * (12 * factor + 2) + 2
    assert Image.open(out / "overview.png").size == size


def test_a_folder_of_pictures_with_masks_or_alpha(conditional_run: Path, tmp_path: Path) -> None:
    first, second = PIXELS[:2]
    observed = np.ones(SIZE, bool)
    observed[2:9, 3:8] = False
    save(first, tmp_path / "masks" / "a cat.png")
    save(255 * observed, tmp_path / "masks" / "a cat.mask.png")
    save(second, tmp_path / "masks" / "whole.png")
    save(np.stack([first, 255 * observed], 2), tmp_path / "alpha" / "a cat.png")
    found = {}
    for name in ("masks", "alpha"):
        out = tmp_path / f"{name}-out"
        records = impute(conditional_run, out, f"data={tmp_path / name}", "samples=40")
        assert records[0]["key"] == "a cat"
        found[name] = array(out, records[0], "mean")[0]
        assert (found[name][observed] == first[observed]).all()
    np.testing.assert_allclose(found["masks"], found["alpha"], rtol=1e-4)
    whole = np.load(tmp_path / "masks-out" / "000001-whole" / "mean.npy")[0]
    assert (whole == second).all()


def test_pictures_are_called_by_their_names_and_only_those_of_data_are_taken(
    conditional_run: Path, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "holes"
    for name in ("a", "c"):
        save(PIXELS[0], folder / f"{name}.png")
    save(255 * np.eye(*SIZE), folder / "a.mask.png")
    (folder / "b.png").write_bytes(b"")
    impute(conditional_run, tmp_path / "out", f"data={folder}", "samples=40")
    assert "1 images are left out; the first: b: " in capsys.readouterr().err
    monkeypatch.chdir(folder)  # without data=, those of the run
    records = impute(conditional_run, tmp_path / "own", "num_images=2", "samples=40")
    assert [record["missing_fraction"] for record in records] == [0.5, 0.5]


def test_a_run_on_complete_images_needs_a_mask(
    spatial_run: Path, tmp_path: Path, capsys: Printed
) -> None:
    assert main([f"run={spatial_run}", f"out={tmp_path}/o", "device=cpu"]) == 2
    assert "trained on complete images" in capsys.readouterr().err
    keys = ("mask=rectangle", "mask_fraction=0.25", "num_images=2", "samples=40")
    records = impute(spatial_run, tmp_path / "o", *keys)
    assert all(abs(record["missing_fraction"] - 0.25) < 0.05 for record in records)


def test_what_impute_refuses(conditional_run: Path, tmp_path: Path, capsys: Printed) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    save(PIXELS[0], tmp_path / "whole" / "cat.png")
    for keys, reason in (
        (["method=single", "samples=7"], "samples=7 has no effect with method=single"),
        (["samples=1"], "samples=1 must be at least 2"),
        (["mask_fraction=0.2"], "mask_fraction=0.2 has no effect with mask=auto"),
        ([f"out={tmp_path}/full"], "exists already"),
        ([f"data={tmp_path}/whole", "samples=40"], "no pixel of the 1 images of"),
    ):
        assert main([f"run={conditional_run}", f"out={tmp_path}/new", "device=cpu", *keys]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
