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

SIZE = (12, 10)  # of the images of `run`


def pictures(count: int = 6) -> np.ndarray:
    return random_pixels(count, *SIZE)


@pytest.fixture
def run(conditional_run: Path) -> Path:
    return conditional_run


def impute(run: Path, out: Path, *keys: str) -> dict[str, Any]:
    assert main([f"run={run}", f"out={out}", "device=cpu", "samples=40", *keys]) == 0
    found: dict[str, Any] = json.loads((out / "imputed.json").read_text())
    return found


def array(out: Path, record: dict[str, Any], name: str) -> np.ndarray:
    found: np.ndarray = np.load(out / record["folder"] / f"{name}.npy")
    return found


@pytest.mark.parametrize("method", ["importance", "gibbs"])
def test_observed_pixels_stay_and_missing_ones_are_filled(
    run: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    facts = impute(run, out, f"method={method}", "draws=3", "num_images=3")
    assert [record["key"] for record in facts["images"]] == ["0000", "0001", "0002"]
    for record, truth in zip(facts["images"], pictures()[:3], strict=True):
        mean, std, draws = (array(out, record, name) for name in ("mean", "std", "draws"))
        assert mean.shape == std.shape == (1, *SIZE) and draws.shape == (3, 1, *SIZE)
        assert record["missing_fraction"] == 0.5
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
    width, height = Image.open(out / "overview.png").size
    assert width == columns * (10 * factor + 2) + 2 and height == rows * (12 * factor + 2) + 2


def test_pictures_that_lie_where_it_is_typed_are_not_taken(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "samples.png")
    monkeypatch.chdir(tmp_path)
    facts = impute(run, tmp_path / "out", "num_images=2")
    assert [record["missing_fraction"] for record in facts["images"]] == [0.5, 0.5]


def test_a_single_draw(run: Path, tmp_path: Path) -> None:
    assert (
        main(
            [
                f"run={run}",
                f"out={tmp_path}/o",
                "device=cpu",
                "method=single",
                "draws=2",
            ]
        )
        == 0
    )
    (record, *_) = json.loads((tmp_path / "o" / "imputed.json").read_text())["images"]
    assert (
        array(tmp_path / "o", record, "mean") == array(tmp_path / "o", record, "draws")[0]
    ).all()


def test_a_folder_of_pictures_with_masks_or_alpha(run: Path, tmp_path: Path) -> None:
    first, second = pictures(2)
    observed = np.ones(SIZE, bool)
    observed[2:9, 3:8] = False
    masks, alpha = tmp_path / "masks", tmp_path / "alpha"
    for folder in (masks, alpha):
        folder.mkdir()
    Image.fromarray(first).save(masks / "a cat.png")
    Image.fromarray(np.where(observed, 255, 0).astype(np.uint8)).save(masks / "a cat.mask.png")
    Image.fromarray(second).save(masks / "whole.png")
    channels = np.stack([first, np.where(observed, 255, 0).astype(np.uint8)], 2)
    Image.fromarray(channels).save(alpha / "a cat.png")
    found = {}
    for folder in (masks, alpha):
        out = tmp_path / f"{folder.name}-out"
        facts = impute(run, out, f"data={folder}")
        assert facts["images"][0]["key"] == "a cat"
        found[folder.name] = array(out, facts["images"][0], "mean")[0]
        assert (found[folder.name][observed] == first[observed]).all()
    np.testing.assert_allclose(found["masks"], found["alpha"], rtol=1e-4)
    whole = np.load(tmp_path / "masks-out" / "000001-whole" / "mean.npy")[0]
    assert (whole == second).all()


def test_a_picture_that_cannot_be_read_is_called_by_its_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "holes"
    folder.mkdir()
    for name in ("a", "c"):
        Image.fromarray(pictures()[0]).save(folder / f"{name}.png")
    Image.fromarray(np.eye(*SIZE, dtype=np.uint8) * 255).save(folder / "a.mask.png")
    (folder / "b.png").write_bytes(b"")
    impute(run, tmp_path / "out", f"data={folder}")
    assert "1 images are left out; the first: b: " in capsys.readouterr().err


def test_a_run_on_complete_images_needs_a_mask(
    spatial_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"run={spatial_run}", f"out={tmp_path}/o", "device=cpu"]) == 2
    assert "trained on complete images" in capsys.readouterr().err
    keys = ("mask=rectangle", "mask_fraction=0.25", "num_images=2")
    facts = impute(spatial_run, tmp_path / "o", *keys)
    assert all(abs(record["missing_fraction"] - 0.25) < 0.05 for record in facts["images"])


def test_pictures_without_a_missing_pixel_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole").mkdir()
    Image.fromarray(pictures()[0]).save(tmp_path / "whole" / "cat.png")
    assert main([f"run={run}", f"data={tmp_path}/whole", f"out={tmp_path}/o", "device=cpu"]) == 2
    assert "no pixel of the 1 images of" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_what_impute_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for keys, reason in (
        (["method=single", "samples=7"], "samples=7 has no effect with method=single"),
        (["samples=1"], "samples=1 must be at least 2"),
        (["mask_fraction=0.2"], "mask_fraction=0.2 has no effect with mask=auto"),
        ([f"out={tmp_path}/full"], "exists already"),
    ):
        assert main([f"run={run}", f"out={tmp_path}/new", "device=cpu", *keys]) == 2
        assert reason in capsys.readouterr().err
