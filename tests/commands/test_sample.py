"""`sample` and `reconstruct` through their entry points: pictures, labels, sizes, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny_run import random_pixels, tiny_config, write_run
from vae_dist import evaluate, reconstruct, sample

Printed = pytest.CaptureFixture[str]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def written(verb: Any, run: Path, out: Path, *keys: str) -> np.ndarray:
    assert verb.main([f"run={run}", f"out={out}", "device=cpu", *keys]) == 0
    return pixels(out)


def singles(run: Path, out: Path, *keys: str) -> list[np.ndarray]:
    """Single pictures of `sample`, in the order of their names."""
    assert sample.main([f"run={run}", f"out={out}", "device=cpu", *keys]) == 0
    return [pixels(path) for path in sorted(out.iterdir())]


@pytest.mark.parametrize("verb", [sample, reconstruct, evaluate])
def test_help_lists_every_key(verb: Any, capsys: Printed) -> None:
    assert verb.main(["--help"]) == 0
    text = capsys.readouterr().out
    keys = ("run=", "checkpoint=latest", "weights=ema", "batch_size=256")
    assert all(key in text for key in keys)
    assert ("seed=0" in text) == (verb is not reconstruct)  # which draws nothing
    assert ("model.latent=vector" in text) == (verb is not reconstruct)  # what gmm:K needs


def test_grids(plain_run: Path, conditional_run: Path, tmp_path: Path) -> None:
    grid = written(sample, plain_run, tmp_path / "deep" / "samples.png", "num_images=9")
    assert grid.shape == (3 * 86 + 2, 3 * 86 + 2)
    keys = ("prior=gmm:2", "num_images=4", "compare=true")
    both = written(sample, plain_run, tmp_path / "both.png", *keys)
    assert both.shape == (2 * 86 + 2, 2 * (2 * 86 + 2) + 10)
    rows = written(sample, conditional_run, tmp_path / "rows.png", "label=all", "num_images=13")
    height, width = 12 * (96 // 12), 10 * (96 // 12)
    assert rows.shape == (3 * (height + 2) + 2, 5 * (width + 2) + 2)  # a row for each class


def test_single_images(spatial_run: Path, tmp_path: Path, capsys: Printed) -> None:
    found = singles(spatial_run, tmp_path / "out", "num_images=3", "resolution=[25,32]")
    assert [image.shape for image in found] == [(25, 32, 3)] * 3
    # they hold every channel and level
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


def test_labels(conditional_run: Path, tmp_path: Path, capsys: Printed) -> None:
    """Image i has the same latent for every class; `all` is a row of each; `auto` draws them."""

    def drawn(label: str, *keys: str) -> list[np.ndarray]:
        return singles(conditional_run, tmp_path / f"{label}{keys}", f"label={label}", *keys)

    by_label = {label: drawn(label, "num_images=12") for label in ("0", "1", "2", "none")}
    for label in ("1", "none"):
        pairs = zip(by_label["0"], by_label[label], strict=True)
        assert not any((a == b).all() for a, b in pairs)
    expected = [image for label in ("0", "1", "2") for image in by_label[label][:2]]
    every = drawn("all", "num_images=6")  # two of each
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(every, expected, strict=True))
    capsys.readouterr()
    auto = drawn("auto", "num_images=12")
    assert "12 samples, label=auto, step 20" in capsys.readouterr().out
    found = [
        [label for label in ("0", "1", "2") if (by_label[label][i] == image).all()]
        for i, image in enumerate(auto)
    ]
    assert all(len(labels) == 1 for labels in found)
    assert {labels[0] for labels in found} == {"0", "1", "2"}
    fewer = drawn("auto", "num_images=5", "batch_size=2")
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(fewer, auto, strict=False))


def test_reconstruct(plain_run: Path, spatial_run: Path, tmp_path: Path) -> None:
    """Inputs above, in tiles where these are smaller than the image."""
    picture = written(reconstruct, plain_run, tmp_path / "r.png", "num_images=3")
    first = random_pixels(8, 28, 28)[0]
    assert (picture[3 : 3 + 84 : 3, 3 : 3 + 84 : 3] == first).all()
    assert picture.shape == (2 + 84 + 2 + 84 + 2, 2 * 86 + 2)  # the third one is unreadable
    whole, tiled, fitting = (
        written(reconstruct, spatial_run, tmp_path / f"{tile}.png", f"tile={tile}", "num_images=2")
        for tile in (0, 16, 20)
    )
    assert tiled.shape == whole.shape and (fitting == whole).all()
    assert np.abs(tiled - whole).max() > 0  # a tile has norms of its own


def test_refusals(
    plain_run: Path, spatial_run: Path, conditional_run: Path, tmp_path: Path, capsys: Printed
) -> None:
    (tmp_path / "file").write_text("in the way")
    for verb, run, key, reason in (
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
        assert verb.main([f"run={run}", "device=cpu", key]) == 2
        assert reason in capsys.readouterr().err
