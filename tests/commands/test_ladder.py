"""A ladder through every command: trained, evaluated, drawn from, reconstructed by levels, encoded
and decoded; what it cannot do is refused by name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vae_dist
from tests.support.training import rows, train
from vae_dist import decode, encode, evaluate, export, impute, reconstruct, report, sample

LADDER = (
    *("model.arch=ladder", "model.latent=spatial", "model.latent_channels=2"),
    *("model.channels=[8,16]", "model.patch=4", "model.factors=7", "model.groups=[2,1]"),
    *("training.spike_factor=10", "log.num_images=4", "training.steps=4", "evaluation.every=0"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("ladder") / "run"
    assert train(folder, digits, *LADDER) == [0]
    return folder


def done(command, run, *keys):
    return command.main([f"run={run}", "device=cpu", *keys])


def test_rates_of_groups_bounds_and_pictures_of_levels(run, tmp_path):
    row, found = rows(run)[4], []
    assert sum(row["latent/kl_nats_per_unit"]) == pytest.approx(row["eval/rate_nats"], rel=1e-4)
    assert "latent/mutual_information_nats" not in row
    names = " ".join(path.stem for path in (run / "images").rglob("*.png"))
    assert "levels" in names and "travers" not in names
    assert report.main([f"run={run}"]) == 0
    for keys in ("metrics=psnr", "chunk=7 batch_size=6"):  # the draws of an image are its own
        out = f"out={tmp_path / 'results.json'}"
        assert done(evaluate, run, "max_images=20", "samples=60", out, *keys.split()) == 0
        record = json.loads((tmp_path / "results.json").read_text())
        rates = record["latents"]["kl_nats_per_unit"]
        assert len(rates) == 3 and sum(rates) == pytest.approx(record["figures"]["rate_nats"])
        found.append(record["figures"])
    assert found[0]["is_nll_nats"] < found[0]["neg_elbo_nats"]
    assert found[0]["rate_nats"] > 0 and found[0]["psnr_db"] > 0
    assert found[1]["is_nll_nats"] == pytest.approx(found[0]["is_nll_nats"], rel=1e-6)


def test_samples_reconstructions_and_latents(run, tmp_path, digits):
    def pixels(command, *keys):
        out = tmp_path / "pixels.png"
        assert done(command, run, f"out={out}", "num_images=4", *keys) == 0
        return np.asarray(Image.open(out)).astype(int)

    assert (pixels(sample, "temperature=[1.0,0.5]") != pixels(sample)).any()
    assert (pixels(reconstruct, "levels=1") != pixels(reconstruct)).any()
    latents = tmp_path / "latents"
    stored = (f"data={digits}/validation", f"out={latents}", "content=mean", "dtype=fp32")
    assert done(encode, run, *stored) == 0
    assert pixels(decode, f"data={latents}").any()
    filled = ("mask=half", "num_images=2", "samples=8", f"out={tmp_path / 'filled'}")
    assert done(impute, run, *filled) == 0


def test_the_python_api(run):
    vae = vae_dist.load(run, device="cpu")
    images = vae.sample(3, seed=1, size=(56, 28))
    mean, std = vae.encode(images)
    assert mean.shape == std.shape == (3, *vae.latent_shape((56, 28)))
    torch.testing.assert_close(vae.decode(mean, size=(56, 28)), vae.reconstruct(images))
    assert vae.neg_elbo(images).isfinite().all()
    with pytest.raises(ValueError, match="temperature has 3 values, and this model 2 levels"):
        vae.sample(1, temperature=[1, 1, 1])
    for levels in (-1, 0, 3):
        with pytest.raises(ValueError, match=f"levels={levels}: this model is a ladder of 2"):
            vae.reconstruct(images, levels=levels)


def test_what_a_ladder_cannot_do(run, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command, keys, fragment in (
        (encode, "content=moments data=x out=y", "content=moments"),
        (evaluate, "metrics=viv,psnr max_images=4", "metrics=viv,psnr"),
        (reconstruct, "tile=64", "tile=64"),
        (impute, "method=gibbs mask=half out=filled", "method=gibbs"),
        (sample, "prior=gmm:2", "prior=gmm:2"),
        (export, "out=exported", "model.arch=ladder"),
    ):
        assert command.main([f"run={run}", *keys.split()]) == 2
        assert fragment in capfd.readouterr().err
