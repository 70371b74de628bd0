"""The commands on a run folder, through their entry points."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.distributed import run_ranks
from tests.support.tiny_run import tiny_config, write_images, write_run
from vae_dist import evaluate, reconstruct, sample

NUM_IMAGES = 7


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vector-latent model of 28x28 grey images, and validation shards with one broken image."""
    folder = tmp_path_factory.mktemp("work")
    pixels = np.random.default_rng(0).integers(1, 256, (NUM_IMAGES + 1, 28, 28), dtype=np.uint8)
    pixels[2] = 0  # written as no PNG
    write_images(folder / "validation", pixels)
    config = tiny_config()
    config.data.train = config.data.validation = str(folder / "validation")
    write_run(folder / "run", config, (28, 28))
    return folder / "run"


def spatial_run(folder: Path) -> Path:
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    pixels = np.random.default_rng(0).integers(1, 256, (3, 20, 16, 3), dtype=np.uint8)
    write_images(folder / "images", pixels)
    config.data.train = config.data.validation = str(folder / "images")
    write_run(folder / "run", config, (20, 16))
    return folder / "run"


@pytest.mark.parametrize("command", [sample, reconstruct, evaluate])
def test_help_lists_every_key(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0  # type: ignore[attr-defined]
    text = capsys.readouterr().out
    assert all(
        key in text for key in ("run=", "checkpoint=latest", "weights=ema", "batch_size=256")
    )


@pytest.mark.parametrize("command", [sample, reconstruct, evaluate])
def test_what_is_wrong_is_said_on_stderr(
    command: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([f"run={tmp_path}", "wieghts=ema"]) == 2  # type: ignore[attr-defined]
    assert "did you mean weights" in capsys.readouterr().err
    assert command.main([f"run={tmp_path}", "device=cpu"]) == 2  # type: ignore[attr-defined]
    assert "no run folder" in capsys.readouterr().err


def test_sample_writes_a_grid(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "samples.png"
    assert sample.main([f"run={run}", f"out={out}", "num_images=9", "device=cpu"]) == 0
    picture = Image.open(out)
    assert (picture.mode, picture.size) == ("L", (3 * 86 + 2, 3 * 86 + 2))


def test_sample_writes_single_images_of_another_size(tmp_path: Path) -> None:
    run = spatial_run(tmp_path)
    out = tmp_path / "samples"
    keys = [f"run={run}", f"out={out}", "num_images=3", "resolution=[25,32]", "device=cpu"]
    assert sample.main(keys) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["000000.png", "000001.png", "000002.png"]
    picture = Image.open(out / names[0])
    assert (picture.mode, picture.size) == ("RGB", (32, 25))


def test_sample_refuses_what_cannot_be(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main([f"run={run}", "resolution=32", "device=cpu"]) == 2
    assert "resolution=32: images of 32x32 pixels" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    assert sample.main([f"run={run}", f"out={tmp_path}/file/a.png", "device=cpu"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_reconstruct_shows_the_inputs_above(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.png"
    assert reconstruct.main([f"run={run}", f"out={out}", "num_images=3", "device=cpu"]) == 0
    picture = np.asarray(Image.open(out))
    shard = run.parent / "validation"
    assert shard.is_dir()
    first = np.random.default_rng(0).integers(1, 256, (NUM_IMAGES + 1, 28, 28), dtype=np.uint8)[0]
    assert (picture[3 : 3 + 84 : 3, 3 : 3 + 84 : 3] == first).all()
    assert picture.shape == (2 + 84 + 2 + 84 + 2, 2 * 86 + 2)  # the third one is unreadable


def test_evaluate_writes_results(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([f"run={run}", "device=cpu", "checkpoint=10"]) == 0
    results = json.loads((run / "results.json").read_text())
    figures = results["figures"]
    assert (results["step"], results["weights"]) == (10, "ema")
    assert results["precision"] == "float32"
    assert set(results["versions"]) >= {"vae_dist", "torch", "accelerate", "python"}
    assert (figures["num_images"], figures["skipped_samples"]) == (NUM_IMAGES, 1)
    total = figures["rate_nats"] + figures["distortion_nats"]
    assert figures["neg_elbo_nats"] == pytest.approx(total)
    assert f"{figures['neg_elbo_nats']:.3f}" in capsys.readouterr().out


def test_evaluate_other_shards_into_another_file(run: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "other", np.full((2, 28, 28), 9, np.uint8))
    keys = [f"run={run}", f"data={tmp_path}/other", f"out={tmp_path}/o.json", "device=cpu"]
    assert evaluate.main(keys) == 0
    assert json.loads((tmp_path / "o.json").read_text())["figures"]["num_images"] == 2


def test_evaluate_on_two_ranks_finds_the_same_figures(run: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "1.json", tmp_path / "2.json"
    keys = [f"run={run}", "device=cpu", "batch_size=3"]
    assert evaluate.main([*keys, f"out={alone}"]) == 0
    assert run_ranks(2, evaluate_quietly, [*keys, f"out={together}"]) == [0, 0]
    one, two = (json.loads(path.read_text()) for path in (alone, together))
    assert (one["world"], two["world"]) == (1, 2)
    for name, value in one["figures"].items():
        assert two["figures"][name] == pytest.approx(value, rel=1e-5), name


def evaluate_quietly(keys: list[str]) -> int:
    return evaluate.main(keys)
