"""`sample label=`: which class each image is of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny_run import tiny_config, write_run
from vae_dist.sample import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, told one of three classes."""
    folder = tmp_path_factory.mktemp("conditional") / "run"
    write_run(folder, tiny_config(num_classes=3), (28, 28))
    return folder


def images(run: Path, out: Path, *keys: str) -> list[np.ndarray]:
    """Single pictures of `sample`, in the order of their names."""
    assert main([f"run={run}", f"out={out}", "device=cpu", *keys]) == 0
    return [np.asarray(Image.open(path)) for path in sorted(out.iterdir())]


def test_the_same_latents_are_decoded_for_another_class(run: Path, tmp_path: Path) -> None:
    by_label = {
        label: images(run, tmp_path / label, f"label={label}", "num_images=2")
        for label in ("0", "1", "none")
    }
    assert not any((a == b).all() for a, b in zip(by_label["0"], by_label["1"], strict=True))
    assert not any((a == b).all() for a, b in zip(by_label["0"], by_label["none"], strict=True))
    every = images(run, tmp_path / "all", "label=all", "num_images=6")  # two of each
    assert len(every) == 6
    assert all(
        (a == b).all() for a, b in zip(every[:4], by_label["0"] + by_label["1"], strict=True)
    )


def test_without_a_label_classes_are_drawn(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = images(run, tmp_path / "auto", "num_images=12")
    assert "12 samples, label=auto, step 20" in capsys.readouterr().out
    of_class = [
        images(run, tmp_path / str(label), f"label={label}", "num_images=12") for label in range(3)
    ]
    labels = [
        [label for label in range(3) if (of_class[label][i] == drawn[i]).all()] for i in range(12)
    ]
    assert all(len(found) == 1 for found in labels)
    assert {found[0] for found in labels} == {0, 1, 2}
    fewer = images(run, tmp_path / "fewer", "num_images=5", "batch_size=2")
    assert all((a == b).all() for a, b in zip(fewer, drawn, strict=False))


def test_a_grid_has_a_row_for_each_class(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    keys = [f"run={run}", f"out={out}", "device=cpu", "label=all", "num_images=13"]
    assert main(keys) == 0
    assert Image.open(out).size == (5 * 86 + 2, 3 * 86 + 2)


def test_what_label_cannot_be(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"run={run}", "label=3", "device=cpu"]) == 2
    assert "label=3: this model knows the classes 0 to 2" in capsys.readouterr().err
    assert main([f"run={run}", "label=seven"]) == 2
    assert "label=seven is none of auto, all, none and a class 0, 1, ..." in capsys.readouterr().err
    plain = tmp_path / "plain"
    write_run(plain, tiny_config(), (28, 28))
    for label in ("2", "all", "none"):
        assert main([f"run={plain}", f"label={label}", "device=cpu"]) == 2
        assert f"label={label} has no effect" in capsys.readouterr().err
