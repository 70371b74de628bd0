"""The commands on a run folder, through their entry points."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.distributed import run_ranks
from tests.support.tiny_run import tiny_config, write_images, write_run
from vae_dist import evaluate, reconstruct, sample
from vae_dist.models import networks
from vae_dist.models.networks import PretrainedFile

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


def test_reconstruct_in_tiles(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spatial = spatial_run(tmp_path)
    keys = [f"run={spatial}", "num_images=2", "device=cpu"]
    pictures = []
    for tile in (0, 16, 20):
        out = tmp_path / f"{tile}.png"
        assert reconstruct.main([*keys, f"out={out}", f"tile={tile}"]) == 0
        pictures.append(np.asarray(Image.open(out)).astype(int))
    whole, tiled, fitting = pictures
    assert tiled.shape == whole.shape and (fitting == whole).all()
    assert np.abs(tiled - whole).max() > 0  # a tile has norms of its own
    assert reconstruct.main([*keys, "tile=4"]) == 2
    assert "give at least tile=16" in capsys.readouterr().err
    assert reconstruct.main([f"run={run}", "device=cpu", "tile=512"]) == 2
    assert "tile=512: a vector latent holds the whole image" in capsys.readouterr().err


def test_evaluate_writes_results(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([f"run={run}", "device=cpu", "checkpoint=10"]) == 0
    results = json.loads((run / "results_step10.json").read_text())
    figures = results["figures"]
    assert (results["step"], results["weights"]) == (10, "ema")
    assert results["precision"] == "float32"
    assert set(results["versions"]) >= {"vae_dist", "torch", "accelerate", "python"}
    assert (figures["num_images"], figures["skipped_samples"]) == (NUM_IMAGES, 1)
    total = figures["rate_nats"] + figures["distortion_nats"]
    assert figures["neg_elbo_nats"] == pytest.approx(total)
    assert f"{figures['neg_elbo_nats']:.3f}" in capsys.readouterr().out


def test_evaluate_estimates_the_evidence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "is.json"
    keys = [f"run={run}", f"out={out}", "device=cpu", "samples=20", "max_images=4"]
    assert evaluate.main(keys) == 0
    results = json.loads(out.read_text())
    figures = results["figures"]
    assert results["conditions"]["is_nll_nats"] == {"importance_samples": 20}
    assert (figures["num_images"], figures["skipped_samples"]) == (3, 1)
    assert figures["is_nll_nats"] < figures["neg_elbo_nats"] + figures["is_nll_se_nats"]
    assert 1 <= figures["is_effective_samples"] <= 20
    assert f"{figures['is_nll_nats']:.3f}" in capsys.readouterr().out
    assert evaluate.main([f"run={run}", "chunk=10"]) == 2
    assert "chunk=10 has no effect with samples=0" in capsys.readouterr().err


def test_figures_of_earlier_evaluations_stay(run: Path, tmp_path: Path) -> None:
    """As long as weights, images and seed are the same; each with what it rests on."""
    out = tmp_path / "r.json"
    keys = [f"run={run}", f"out={out}", "device=cpu", "max_images=2"]

    def figures(*more: str) -> dict[str, float]:
        assert evaluate.main([*keys, *more]) == 0
        found: dict[str, float] = json.loads(out.read_text())["figures"]
        return found

    first = figures("samples=9")
    both = figures("metrics=psnr")
    assert both.keys() - first.keys() == {"psnr_db"} and both.items() >= first.items()
    record = json.loads(out.read_text())
    assert record["conditions"]["is_nll_nats"] == {"importance_samples": 9}
    assert "is_nll_nats" in record["notes"]
    assert not figures("seed=1").keys() & {"psnr_db", "is_nll_nats"}


def test_a_part_of_the_images_does_not_replace_the_results_of_all(run: Path) -> None:
    assert evaluate.main([f"run={run}", "device=cpu"]) == 0
    whole = (run / "results.json").read_bytes()
    assert evaluate.main([f"run={run}", "device=cpu", "max_images=4", "weights=model"]) == 0
    assert (run / "results.json").read_bytes() == whole
    part = json.loads((run / "results_model_first4.json").read_text())
    assert part["figures"]["num_images"] + part["figures"]["skipped_samples"] == 4


def test_evaluate_measures_reconstructions(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "metrics.json"
    keys = [f"run={run}", f"out={out}", "device=cpu", "metrics=psnr,ssim,ms_ssim"]
    assert evaluate.main(keys) == 0
    results = json.loads(out.read_text())
    assert 3 < results["figures"]["psnr_db"] < 15
    assert -1 < results["figures"]["ssim"] < 1
    assert list(results["notes"]) == ["ms_ssim"]
    assert "less than 176 pixels" in capsys.readouterr().out
    assert evaluate.main([f"run={run}", "metrics=pnsr"]) == 2
    assert "metrics=pnsr is not one or several of psnr" in capsys.readouterr().err


def test_evaluate_measures_with_published_networks(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With toys in their place: which files are asked for, and what becomes of the figures."""
    asked = []

    def fetch(file: PretrainedFile, folder: Path | None) -> Path:
        asked.append((file.network, folder))
        return tmp_path / file.name

    class Distance(torch.nn.Module):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            assert first.shape[1] == 3
            return (first - second).abs().mean((1, 2, 3))

    class Pixels(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0, :4, :2].flatten(1)

    monkeypatch.setattr(networks, "fetch", fetch)
    monkeypatch.setattr(networks, "load_lpips", lambda *_: Distance())
    monkeypatch.setattr(networks, "load_inception", lambda _: Pixels())
    monkeypatch.setattr(networks, "NUM_FEATURES", 8)
    out = tmp_path / "networks.json"
    keys = [f"run={run}", "device=cpu", f"out={out}", f"metric_weights={tmp_path}"]
    assert evaluate.main([*keys, "metrics=[lpips,lpips_alex,rfid,fid]", "prior=gmm:1"]) == 0
    results = json.loads(out.read_text())
    figures = results["figures"]
    assert figures["lpips"] > 0
    assert figures["rfid"] > 0
    assert {"fid", "fid_gmm"} <= set(figures)
    assert list(results["notes"]) == ["lpips_alex", "frechet"]  # 28 pixels, 7 images
    assert {name for name, _ in asked} == {"VGG16", "AlexNet", "the InceptionV3 of the FID"}
    assert {folder for _, folder in asked} == {tmp_path}
    capsys.readouterr()
    assert evaluate.main([*keys, "metrics=psnr"]) == 2
    assert "has no effect without lpips" in capsys.readouterr().err


def test_a_fitted_prior_for_sample_and_evaluate(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, results = tmp_path / "both.png", tmp_path / "gmm.json"
    prior = [f"run={run}", "device=cpu", "prior=gmm:2"]
    assert sample.main([*prior, f"out={out}", "num_images=4", "compare=true"]) == 0
    text = capsys.readouterr().out
    assert "2 Gaussians, full covariance" in text
    assert "kept in" in text
    assert Image.open(out).size == (2 * (2 * 86 + 2) + 10, 2 * 86 + 2)
    file = run / "priors" / "gmm2_full_ema_step_00000020.safetensors"
    written = file.stat().st_mtime_ns
    assert evaluate.main([*prior, f"out={results}", "samples=9"]) == 0
    figures = json.loads(results.read_text())["figures"]
    assert {"neg_elbo_gmm_nats", "rate_gmm_nats", "is_nll_gmm_nats", "is_nll_nats"} <= set(figures)
    assert file.stat().st_mtime_ns == written  # read again, not fitted again
    assert f"from {file}" in capsys.readouterr().out
    # another checkpoint has another prior
    assert sample.main([*prior, f"out={tmp_path}/10.png", "checkpoint=10"]) == 0
    assert (run / "priors" / "gmm2_full_ema_step_00000010.safetensors").exists()


def test_a_fitted_prior_is_refused_where_it_cannot_be(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spatial = spatial_run(tmp_path)
    assert sample.main([f"run={spatial}", "device=cpu", "prior=gmm:2"]) == 2
    assert "this model has a spatial one; train with model.latent=vector" in capsys.readouterr().err
    assert sample.main([f"run={run}", "device=cpu", "prior=gmm:50"]) == 2
    assert "7 training images could be read, fewer than components" in capsys.readouterr().err
    assert sample.main([f"run={run}", "prior=gmm:x", "compare=true"]) == 2
    assert "prior=gmm:x is none of normal, gmm:K" in capsys.readouterr().err
    assert sample.main([f"run={run}", "compare=true", "prior_images=10"]) == 2
    text = capsys.readouterr().err
    assert "compare=true has no effect with prior=normal" in text
    assert "prior_images=10 has no effect with prior=normal" in text


def test_evaluate_other_shards_into_another_file(run: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "other", np.full((2, 28, 28), 9, np.uint8))
    keys = [f"run={run}", f"data={tmp_path}/other", f"out={tmp_path}/o.json", "device=cpu"]
    assert evaluate.main(keys) == 0
    assert json.loads((tmp_path / "o.json").read_text())["figures"]["num_images"] == 2


def test_evaluate_on_two_ranks_finds_the_same_figures(run: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "1.json", tmp_path / "2.json"
    keys = [f"run={run}", "device=cpu", "batch_size=3", "samples=7", "prior=gmm:1:diagonal"]
    assert evaluate.main([*keys, f"out={alone}"]) == 0
    assert run_ranks(2, evaluate_quietly, [*keys, f"out={together}"]) == [0, 0]
    one, two = (json.loads(path.read_text()) for path in (alone, together))
    assert (one["world"], two["world"]) == (1, 2)
    for name, value in one["figures"].items():
        assert two["figures"][name] == pytest.approx(value, rel=1e-5), name


def evaluate_quietly(keys: list[str]) -> int:
    return evaluate.main(keys)
