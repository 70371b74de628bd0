"""A ladder through every command: trained on 1 and 2 ranks, killed and resumed, evaluated, drawn
from, reconstructed by levels, encoded and decoded; what it cannot do is refused by name."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vae_dist
from tests.support.faults import Ranks
from tests.support.training import arguments, losses, rows, same_weights, train
from vae_dist import decode, encode, evaluate, export, impute, reconstruct, report, sample
from vae_dist.train import main

LADDER = (
    "model.arch=ladder",
    "model.latent=spatial",
    "model.latent_channels=2",
    "model.channels=[8,16]",
    "model.patch=4",
    "model.factors=7",
    "model.groups=[2,1]",
    "training.spike_factor=10",
    "log.num_images=4",
    "evaluation.batch_size=500",
)
SHORT = (*LADDER, "training.steps=4", "evaluation.every=4", "checkpoint.every=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("ladder") / "run"
    assert train(folder, digits, *SHORT) == [0]
    return folder


def done(command: object, run: Path, *keys: str) -> int:
    return command.main([f"run={run}", "device=cpu", *keys])  # type: ignore[attr-defined]


def test_rates_of_groups_and_pictures_of_levels_are_logged(run: Path) -> None:
    row = rows(run)[4]
    assert len(row["latent/kl_nats_per_unit"]) == 3  # one of each group
    assert sum(row["latent/kl_nats_per_unit"]) == pytest.approx(row["eval/rate_nats"], rel=1e-4)
    assert "latent/mutual_information_nats" not in row
    names = {path.stem.partition("-")[0] for path in (run / "images").rglob("*.png")}
    assert any("levels" in name for name in names) and not any("travers" in n for n in names)
    assert report.main([f"run={run}"]) == 0


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_and_microbatches_train_as_one_process(
    parallel: str, run: Path, tmp_path: Path, digits: Path
) -> None:
    more = (f"runtime.parallel={parallel}", "training.microbatch_size=16")
    assert train(tmp_path / "run", digits, *SHORT, *more, world=2) == [0, 0]
    torch.testing.assert_close(losses(tmp_path / "run"), losses(run), rtol=2e-5, atol=0)


def test_kill_9_and_a_resume_change_no_bit(run: Path, tmp_path: Path, digits: Path) -> None:
    other = tmp_path / "run"
    with Ranks(1, arguments(other, digits, *SHORT), output=tmp_path / "output") as group:
        group.wait_for_step(3)
        group.signal(signal.SIGKILL)
        group.wait()
    assert train(other, digits, *SHORT) == [0]
    assert same_weights(other, run, 4) and torch.equal(losses(other), losses(run))


def test_importance_weighted_bounds_train_it(tmp_path: Path, digits: Path) -> None:
    more = ("objective.importance_samples=3", "training.steps=2", "evaluation.every=0")
    assert train(tmp_path / "run", digits, *LADDER, *more, "training.batch_size=16") == [0]


def test_evaluate_bounds_and_importance_samples(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    keys = ("max_images=20", "samples=60", "metrics=psnr", f"out={out}")
    assert done(evaluate, run, *keys) == 0
    figures = json.loads(out.read_text())["figures"]
    assert figures["is_nll_nats"] < figures["neg_elbo_nats"]
    assert figures["rate_nats"] > 0 and figures["psnr_db"] > 0
    other = tmp_path / "chunks.json"  # the draws of an image are its own
    assert done(evaluate, run, *keys[:2], "chunk=7", "batch_size=6", f"out={other}") == 0
    again = json.loads(other.read_text())["figures"]
    assert again["is_nll_nats"] == pytest.approx(figures["is_nll_nats"], rel=1e-6)


def test_samples_reconstructions_and_latents(run: Path, tmp_path: Path) -> None:
    def pixels(command: object, name: str, *keys: str) -> np.ndarray:
        out = tmp_path / f"{name}.png"
        assert done(command, run, f"out={out}", "num_images=4", *keys) == 0
        return np.asarray(Image.open(out)).astype(int)

    cold = [pixels(sample, f"cold{seed}", "temperature=0", f"seed={seed}") for seed in (0, 1)]
    assert (cold[0] == cold[1]).all()
    warm = pixels(sample, "warm")
    assert (pixels(sample, "batches", "batch_size=3") - warm).max() <= 1  # the same latents
    assert (pixels(sample, "levels", "temperature=[1.0,0.5]") != warm).any()
    assert (pixels(reconstruct, "top", "levels=1") != pixels(reconstruct, "all")).any()
    latents = tmp_path / "latents"
    data = f"data={run.parent / 'none'}"
    validation = vae_dist.load(run, device="cpu").config.data.validation
    assert done(encode, run, data.replace(data, f"data={validation}"), f"out={latents}",
                "content=mean", "dtype=fp32") == 0  # fmt: skip
    assert pixels(decode, "decoded", f"data={latents}").any()
    filled = ("mask=half", "num_images=2", "samples=8", f"out={tmp_path / 'filled'}")
    assert done(impute, run, *filled) == 0


def test_the_python_api(run: Path) -> None:
    vae = vae_dist.load(run, device="cpu")
    images = vae.sample(3, seed=1)
    torch.testing.assert_close(vae.sample(5, seed=1)[:3], images)  # the same latents
    mean, std = vae.encode(images)
    assert mean.shape == std.shape == (3, *vae.latent_shape())
    torch.testing.assert_close(vae.decode(mean), vae.reconstruct(images))
    assert vae.reconstruct(images, levels=1).shape == images.shape
    assert vae.neg_elbo(images).isfinite().all()
    assert vae.sample(1, size=(56, 28)).shape[-2:] == (56, 28)
    with pytest.raises(ValueError, match="temperature has 3 values, and this model 2 levels"):
        vae.sample(1, temperature=[1, 1, 1])


@pytest.mark.parametrize(
    ("command", "keys", "words"),
    [
        (encode, ("data=x", "out=y", "content=moments"), "content=moments"),
        (reconstruct, ("tile=64",), "tile=64"),
        (reconstruct, ("levels=3",), "levels=3"),
        (impute, ("method=gibbs", "mask=half", "out=filled"), "method=gibbs"),
        (sample, ("prior=gmm:2",), "prior=gmm:2"),
        (export, ("out=exported",), "model.arch=ladder"),
    ],
)
def test_what_a_ladder_cannot_do(command, keys, words, run, tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    device = () if command is export else ("device=cpu",)
    assert command.main([f"run={run}", *device, *keys]) == 2
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.latent=vector", "model.latent=spatial"),
        ("objective.latent_noise=0.1", "objective.latent_noise=0"),
        ("adversarial.weight=0.1", "model.arch=conv"),
        ("model.groups=[1]", "2 counts for the 2 levels"),
        ("model.factors=[2,2]", "1 counts for the 2 levels"),
        ("model.dc_shortcuts=true", "has no effect"),
    ],
)
def test_configs_that_are_refused(override, words, tmp_path, digits, capfd) -> None:
    assert main(arguments(tmp_path / "run", digits, *LADDER, override, "dry_run=true")) == 2
    assert words in capfd.readouterr().err


def test_a_dry_run_counts_its_memory(tmp_path: Path, digits: Path, capfd) -> None:
    assert main(arguments(tmp_path / "run", digits, *LADDER, "dry_run=true")) == 0
    text = capfd.readouterr().out
    assert "memory of one process: about" in text and "1x198 latents" in text
