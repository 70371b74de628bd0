"""`sample` and `reconstruct` through their entry points: pictures, labels, sizes, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny_run import random_pixels, tiny_config, write_run
from vae_dist import evaluate, reconstruct, sample


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def singles(run: Path, out: Path, *keys: str) -> list[np.ndarray]:
    """Single pictures of `sample`, in the order of their names."""
    assert sample.main([f"run={run}", f"out={out}", "device=cpu", *keys]) == 0
    return [pixels(path) for path in sorted(out.iterdir())]


@pytest.mark.parametrize("command", [sample, reconstruct, evaluate])
def test_help_lists_every_key(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0  # type: ignore[attr-defined]
    text = capsys.readouterr().out
    keys = ("run=", "checkpoint=latest", "weights=ema", "batch_size=256")
    assert all(key in text for key in keys)


def test_a_grid(plain_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "samples.png"
    assert sample.main([f"run={plain_run}", f"out={out}", "num_images=9", "device=cpu"]) == 0
    picture = Image.open(out)
    assert (picture.mode, picture.size) == ("L", (3 * 86 + 2, 3 * 86 + 2))


def test_single_images_of_another_size(spatial_run: Path, tmp_path: Path) -> None:
    found = singles(spatial_run, tmp_path / "out", "num_images=3", "resolution=[25,32]")
    assert [image.shape for image in found] == [(25, 32, 3)] * 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[0] == "000000.png"


def test_labels(conditional_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Image i has the same latent for every class; `all` is a row of each; `auto` draws them."""
    by_label = {
        label: singles(conditional_run, tmp_path / label, f"label={label}", "num_images=12")
        for label in ("0", "1", "2", "none")
    }
    for label in ("1", "none"):
        pairs = zip(by_label["0"], by_label[label], strict=True)
        assert not any((a == b).all() for a, b in pairs)
    every = singles(conditional_run, tmp_path / "all", "label=all", "num_images=6")  # two of each
    expected = [image for label in ("0", "1", "2") for image in by_label[label][:2]]
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(every, expected, strict=True))
    capsys.readouterr()
    drawn = singles(conditional_run, tmp_path / "auto", "num_images=12")
    assert "12 samples, label=auto, step 20" in capsys.readouterr().out
    found = [
        [label for label in ("0", "1", "2") if (by_label[label][i] == image).all()]
        for i, image in enumerate(drawn)
    ]
    assert all(len(labels) == 1 for labels in found)
    assert {labels[0] for labels in found} == {"0", "1", "2"}
    fewer = singles(conditional_run, tmp_path / "fewer", "num_images=5", "batch_size=2")
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(fewer, drawn, strict=False))


def test_a_row_for_each_class(conditional_run: Path, tmp_path: Path) -> None:
    keys = [f"run={conditional_run}", f"out={tmp_path}/grid.png", "device=cpu", "label=all"]
    assert sample.main([*keys, "num_images=13"]) == 0
    cell = 12 * (96 // 12), 10 * (96 // 12)
    size = (5 * (cell[1] + 2) + 2, 3 * (cell[0] + 2) + 2)
    assert Image.open(tmp_path / "grid.png").size == size


def test_samples_of_two_priors_side_by_side(plain_run: Path, tmp_path: Path) -> None:
    keys = [f"run={plain_run}", f"out={tmp_path}/both.png", "device=cpu", "prior=gmm:2"]
    assert sample.main([*keys, "num_images=4", "compare=true"]) == 0
    assert Image.open(tmp_path / "both.png").size == (2 * (2 * 86 + 2) + 10, 2 * 86 + 2)


def test_reconstruct_shows_the_inputs_above(plain_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.png"
    assert reconstruct.main([f"run={plain_run}", f"out={out}", "num_images=3", "device=cpu"]) == 0
    picture, first = pixels(out), random_pixels(8, 28, 28)[0]
    assert (picture[3 : 3 + 84 : 3, 3 : 3 + 84 : 3] == first).all()
    assert picture.shape == (2 + 84 + 2 + 84 + 2, 2 * 86 + 2)  # the third one is unreadable


def test_reconstruct_in_tiles(spatial_run: Path, tmp_path: Path) -> None:
    keys = [f"run={spatial_run}", "num_images=2", "device=cpu"]
    for tile in (0, 16, 20):
        assert reconstruct.main([*keys, f"out={tmp_path}/{tile}.png", f"tile={tile}"]) == 0
    whole, tiled, fitting = (pixels(tmp_path / f"{tile}.png") for tile in (0, 16, 20))
    assert tiled.shape == whole.shape and (fitting == whole).all()
    assert np.abs(tiled - whole).max() > 0  # a tile has norms of its own


def test_refusals(
    plain_run: Path,
    spatial_run: Path,
    conditional_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("in the way")
    for command, run, key, reason in (
        (sample, tmp_path, "seed=1", "no run folder"),
        (reconstruct, tmp_path, "wieghts=ema", "did you mean weights"),
        (sample, plain_run, "resolution=32", "resolution=32: images of 32x32 pixels"),
        (sample, plain_run, f"out={tmp_path}/file/a.png", "cannot be written"),
        (sample, plain_run, "out=a.jpg", "a name that ends in .png"),
        (sample, plain_run, "label=2", "label=2 has no effect"),
        (sample, plain_run, "label=all", "label=all has no effect"),
        (sample, conditional_run, "label=3", "this model knows the classes 0 to 2"),
        (sample, conditional_run, "label=seven", "label=seven is"),
        (sample, spatial_run, "prior=gmm:2", "spatial one; train with model.latent=vector"),
        (sample, plain_run, "prior=gmm:x", "prior=gmm:x is"),
        (sample, plain_run, "compare=true", "compare=true has no effect with prior=normal"),
        (sample, plain_run, "prior_images=10", "prior_images=10 has no effect"),
        (reconstruct, spatial_run, "tile=4", "give at least tile=16"),
        (reconstruct, plain_run, "tile=512", "a vector latent holds the whole image"),
    ):
        assert command.main([f"run={run}", "device=cpu", key]) == 2
        assert reason in capsys.readouterr().err


def test_single_images_hold_every_channel_and_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(latent="spatial", kind="gaussian", channels=7)
    config.data.bits = 16
    write_run(tmp_path / "run", config, (32, 32))
    keys = [f"run={tmp_path / 'run'}", "num_images=2", "device=cpu"]
    assert sample.main([*keys, f"out={tmp_path / 'single'}"]) == 0
    files = sorted((tmp_path / "single").iterdir())
    images = [np.load(path) for path in files]
    assert [path.name for path in files] == ["000000.npy", "000001.npy"]
    assert [(one.shape, one.dtype) for one in images] == [((7, 32, 32), np.uint16)] * 2
    assert sample.main([*keys, f"out={tmp_path / 'grid.png'}"]) == 0
    assert "pictures show channels 1 to 3 of 7 and 8 of 16 bits" in capsys.readouterr().out
