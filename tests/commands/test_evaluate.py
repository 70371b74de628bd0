"""`evaluate` through its entry point: which figures stand in which file, and on how many ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vae_dist
from tests.support.distributed import run_ranks
from tests.support.tiny_run import random_pixels, write_images
from tests.support.training import train
from vae_dist import encode, evaluate, sample
from vae_dist.models import networks
from vae_dist.models.networks import PretrainedFile

NUM_IMAGES = 7  # that can be read, of 8


def results(run: Path, out: Path, *more: str) -> dict[str, Any]:
    assert evaluate.main([f"run={run}", f"out={out}", "device=cpu", "threads=1", *more]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_figures_and_what_they_rest_on(
    plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(plain_run, tmp_path / "r.json", "samples=20", "checkpoint=10")
    figures = found["figures"]
    assert (found["step"], found["weights"], found["precision"]) == (10, "ema", "float32")
    assert set(found["versions"]) >= {"vae_dist", "torch", "accelerate", "python"}
    assert (figures["num_images"], figures["skipped_samples"]) == (NUM_IMAGES, 1)
    total = figures["rate_nats"] + figures["distortion_nats"]
    assert figures["neg_elbo_nats"] == pytest.approx(total)
    assert found["conditions"]["is_nll_nats"] == {"importance_samples": 20}
    assert figures["is_nll_nats"] < figures["neg_elbo_nats"] + figures["is_nll_se_nats"]
    assert 1 <= figures["is_effective_samples"] <= 20
    printed = capsys.readouterr().out
    assert f"{figures['neg_elbo_nats']:.3f}" in printed
    assert f"{figures['is_nll_nats']:.3f}" in printed


def test_what_differs_from_the_run_as_it_stands_is_in_the_name(plain_run: Path) -> None:
    keys = [f"run={plain_run}", "device=cpu", "threads=1"]
    assert evaluate.main(keys) == 0
    whole = (plain_run / "results.json").read_bytes()
    assert evaluate.main([*keys, "max_images=4", "weights=model"]) == 0
    part = json.loads((plain_run / "results_model_first4.json").read_text())["figures"]
    assert part["num_images"] + part["skipped_samples"] == 4
    assert evaluate.main([*keys, "checkpoint=10", "seed=3"]) == 0
    assert (plain_run / "results_step10_seed3.json").exists()
    assert (plain_run / "results.json").read_bytes() == whole
    assert not (plain_run / "latents.json").exists()  # a vector latent has none


def test_figures_of_earlier_evaluations_stay(plain_run: Path, tmp_path: Path) -> None:
    """As long as weights, images and seed are the same; each with what it rests on."""
    out = tmp_path / "r.json"
    first = results(plain_run, out, "max_images=2", "samples=9")["figures"]
    record = results(plain_run, out, "max_images=2", "metrics=psnr")
    assert record["figures"].keys() - first.keys() == {"psnr_db"}
    assert record["figures"].items() >= first.items()
    assert record["conditions"]["is_nll_nats"] == {"importance_samples": 9}
    assert "is_nll_nats" in record["notes"]
    other = results(plain_run, out, "max_images=2", "seed=1")["figures"]
    assert not other.keys() & {"psnr_db", "is_nll_nats"}


def test_other_shards(plain_run: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "other", np.full((2, 28, 28), 9, np.uint8))
    found = results(plain_run, tmp_path / "o.json", f"data={tmp_path}/other")
    assert found["figures"]["num_images"] == 2


def test_metrics_of_reconstructions(
    plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(plain_run, tmp_path / "m.json", "metrics=psnr,ssim,ms_ssim")
    assert 3 < found["figures"]["psnr_db"] < 15 and -1 < found["figures"]["ssim"] < 1
    assert list(found["notes"]) == ["ms_ssim"]
    assert "less than 176 pixels" in capsys.readouterr().out


def test_metrics_of_published_networks(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    keys = (f"metric_weights={tmp_path}", "metrics=[lpips,lpips_alex,rfid,fid]", "prior=gmm:1")
    found = results(plain_run, tmp_path / "n.json", *keys)
    figures = found["figures"]
    assert figures["lpips"] > 0 and figures["rfid"] > 0 and {"fid", "fid_gmm"} <= set(figures)
    assert list(found["notes"]) == ["lpips_alex", "frechet"]  # 28 pixels, 7 images
    assert {name for name, _ in asked} == {"VGG16", "AlexNet", "the InceptionV3 of the FID"}
    assert {folder for _, folder in asked} == {tmp_path}


def test_a_fitted_prior_is_kept_for_the_next_command(
    plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(plain_run, tmp_path / "gmm.json", "prior=gmm:3", "samples=9")
    assert {"neg_elbo_gmm_nats", "is_nll_gmm_nats", "is_nll_nats"} <= set(found["figures"])
    text = capsys.readouterr().out
    assert "3 Gaussians, full covariance" in text and "kept in" in text
    (file,) = (plain_run / "priors").glob("gmm3_full_ema_step_00000020_*.safetensors")
    written = file.stat().st_mtime_ns
    keys = [f"run={plain_run}", "device=cpu", "prior=gmm:3"]
    both = [*keys, f"out={tmp_path}/both.png", "num_images=4", "compare=true"]
    assert sample.main(both) == 0
    assert file.stat().st_mtime_ns == written  # read again, not fitted again
    assert f"from {file}" in capsys.readouterr().out
    # another checkpoint has another prior
    assert sample.main([*keys, f"out={tmp_path}/10.png", "checkpoint=10"]) == 0
    assert list((plain_run / "priors").glob("gmm3_full_ema_step_00000010_*.safetensors"))


def test_what_evaluate_refuses(plain_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key, reason in (
        ("chunk=10", "chunk=10 has no effect with samples=0"),
        ("metrics=pnsr", "did you mean metrics=psnr?"),
        ("max_skipped_fraction=0.1", "1 of 8 images to evaluate on cannot be read"),
        ("max_skipped_fraction=2", "is none of trained, a number from 0 to 1"),
        (f"metric_weights={plain_run}", "has no effect without lpips"),
        ("wieghts=ema", "did you mean weights"),
        ("prior=gmm:50", "7 training images could be read, fewer than components"),
        ("out=/proc/nowhere/r.json", "out=/proc/nowhere/r.json: cannot be written"),
    ):
        assert evaluate.main([f"run={plain_run}", "device=cpu", "threads=1", key]) == 2
        assert reason in capsys.readouterr().err


def test_two_ranks_find_the_same_figures_and_statistics(
    plain_run: Path, spatial_run: Path, tmp_path: Path
) -> None:
    options = ("batch_size=3", "samples=7", "prior=gmm:1:diagonal")
    one = results(plain_run, tmp_path / "1.json", *options)
    keys = [f"run={plain_run}", f"out={tmp_path}/2.json", "device=cpu", "threads=1", *options]
    assert run_ranks(2, evaluate_quietly, keys) == [0, 0]
    two = json.loads((tmp_path / "2.json").read_text())
    assert (one["world"], two["world"]) == (1, 2)
    for name, value in one["figures"].items():
        assert two["figures"][name] == pytest.approx(value, rel=1e-5), name
    assert run_ranks(2, evaluate_quietly, [f"run={spatial_run}", "device=cpu"]) == [0, 0]
    statistics = json.loads((spatial_run / "latents.json").read_text())
    vae = vae_dist.load(spatial_run, device="cpu")
    mean, std = vae.encode(torch.from_numpy(random_pixels(3, 20, 16, 3)).permute(0, 3, 1, 2))
    variance = mean.double().var(correction=0) + std.double().square().mean()
    # evaluation encodes dequantised images, as training does
    assert statistics["num_images"] == 3
    assert statistics["scaling_factor"] == pytest.approx(float(variance) ** -0.5, rel=1e-2)
    assert len(statistics["per_channel"]["mean"]) == 3
    for key in ("checkpoint=10", "weights=model", f"out={tmp_path}/r.json"):  # no news of the run
        assert evaluate.main([f"run={spatial_run}", "device=cpu", "threads=1", key]) == 0
    assert json.loads((spatial_run / "latents.json").read_text()) == statistics


def test_training_leaves_the_statistics_of_its_last_step(tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    spatial = ("model.latent=spatial", "model.latent_channels=2", "training.steps=4")
    assert train(run, digits, *spatial, "evaluation.every=0") == [0]
    record = json.loads((run / "latents.json").read_text())
    assert (record["step"], record["weights"], record["num_images"]) == (4, "ema", 1000)
    again = results(run, tmp_path / "r.json")["latents"]
    torch.testing.assert_close(again["per_channel"], record["per_channel"], rtol=1e-4, atol=1e-4)


def evaluate_quietly(keys: list[str]) -> int:
    return evaluate.main(keys)


def test_figures_for_diffusion_models(spatial_run: Path, tmp_path: Path) -> None:
    """The same on two ranks, and nearly of stored latents, which are of images without noise."""
    words = ["metrics=viv,sec,lattice,lnc", "batch_size=2"]
    found = results(spatial_run, tmp_path / "r.json", *words)
    figures = found["figures"]
    assert 0 <= figures["lattice"] <= 1 and "two classes" in found["notes"]["lnc"]
    assert (tmp_path / "r_lattice.png").stat().st_size > 1000
    keys = [f"run={spatial_run}", "device=cpu", "threads=1"]
    assert run_ranks(2, evaluate_quietly, [*keys, f"out={tmp_path}/2.json", *words]) == [0, 0]
    two = json.loads((tmp_path / "2.json").read_text())["figures"]
    for name in ("viv", "sec", "lattice"):
        assert two[name] == pytest.approx(figures[name], rel=1e-5)
    data, shards = spatial_run.parent / "images", tmp_path / "latents"
    stored = [f"data={data}", f"out={shards}", "dtype=fp32", "content=mean"]
    assert encode.main([*keys, *stored]) == 0
    of_latents = results(spatial_run, tmp_path / "l.json", "metrics=sec,viv", f"latents={shards}")
    for name in ("viv", "sec"):
        assert of_latents["figures"][name] == pytest.approx(figures[name], rel=0.05)
    assert evaluate.main([*keys, "metrics=psnr", f"latents={shards}"]) == 2
