"""`evaluate` through its entry point: which figures stand in which file, and on how many ranks."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import vae_dist
from tests.support.distributed import run_ranks
from tests.support.tiny_run import random_pixels, write_images
from vae_dist import encode, evaluate
from vae_dist.models import networks


def keys_of(run, *more):
    return [f"run={run}", "device=cpu", "threads=1", *more]


def results(run, out, *more):
    assert evaluate.main(keys_of(run, f"out={out}", *more)) == 0
    return json.loads(out.read_text())


def test_figures_and_those_of_an_earlier_evaluation(plain_run, tmp_path, capsys):
    out = tmp_path / "r.json"
    found = results(plain_run, out, "samples=20", "checkpoint=10")
    figures = found["figures"]
    assert (found["step"], found["weights"]) == (10, "ema")
    assert (figures["num_images"], figures["skipped_samples"]) == (7, 1)
    assert found["conditions"]["is_nll_nats"] == {"importance_samples": 20}
    assert figures["is_nll_nats"] < figures["neg_elbo_nats"] + figures["is_nll_se_nats"]
    assert 1 <= figures["is_effective_samples"] <= 20
    printed = capsys.readouterr().out
    assert all(f"{figures[f'{name}_nats']:.4f}" in printed for name in ("neg_elbo", "is_nll"))
    again = results(plain_run, out, "checkpoint=10", "metrics=psnr,ssim,ms_ssim")
    assert again["figures"].keys() - figures.keys() == {"psnr_db", "ssim"}
    assert again["figures"].items() >= figures.items()  # each with what it rests on
    assert again["conditions"]["is_nll_nats"] == {"importance_samples": 20}
    assert set(again["notes"]) >= {"ms_ssim", "is_nll_nats"}
    assert 3 < again["figures"]["psnr_db"] < 15 and -1 < again["figures"]["ssim"] < 1
    assert "less than 176 pixels" in capsys.readouterr().out
    anew = results(plain_run, out, "checkpoint=10", "samples=10")
    assert anew["conditions"]["is_nll_nats"] == {"importance_samples": 10}
    assert anew["figures"]["is_nll_nats"] != figures["is_nll_nats"]
    other = results(plain_run, out, "checkpoint=10", "seed=1")["figures"]
    assert not other.keys() & {"psnr_db", "is_nll_nats"}


def test_what_differs_from_the_run_as_it_stands_is_in_the_name(plain_run, tmp_path):
    write_images(tmp_path / "other", np.full((2, 28, 28), 9, np.uint8))
    for keys, name, num_images in (
        ("seed=0", "results", 8),
        ("max_images=4 weights=model", "results_model_first4", 4),
        ("checkpoint=10 seed=3", "results_step10_seed3", 8),
        (f"data={tmp_path}/other", "results_data??????", 2),
    ):
        assert evaluate.main(keys_of(plain_run, *keys.split())) == 0
        (path,) = plain_run.glob(f"{name}.json")
        figures = json.loads(path.read_text())["figures"]
        assert figures["num_images"] + figures["skipped_samples"] == num_images
    assert not (plain_run / "latents.json").exists()  # a vector latent has none


def test_metrics_of_published_networks(plain_run, tmp_path, monkeypatch):
    """With toys in their place: which files are asked for, and what becomes of the figures."""

    class Distance(torch.nn.Module):
        def forward(self, first, second):
            assert first.shape[1] == 3
            return (first - second).abs().mean((1, 2, 3))

    features = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    monkeypatch.setattr(networks, "fetch", fetch := Mock())
    monkeypatch.setattr(networks, "load_lpips", lambda *_: Distance())
    monkeypatch.setattr(networks, "load_inception", lambda _: features)
    monkeypatch.setattr(networks, "NUM_FEATURES", 12)
    keys = (f"metric_weights={tmp_path}", "metrics=[lpips,lpips_alex,rfid,fid]", "prior=gmm:1")
    found = results(plain_run, tmp_path / "n.json", *keys)
    figures = found["figures"]
    assert figures["lpips"] > 0 and figures["rfid"] > 0 and {"fid", "fid_gmm"} <= set(figures)
    assert list(found["notes"]) == ["lpips_alex", "frechet"]  # 28 pixels, 7 images
    files = (networks.VGG16, networks.ALEXNET, networks.INCEPTION)
    assert {call.args for call in fetch.mock_calls} == {(file, str(tmp_path)) for file in files}


def test_two_ranks_stored_latents_and_a_picture(plain_run, conditional_run, spatial_run, tmp_path):
    for run, keys, names in (
        (plain_run, "samples=7 prior=gmm:1:diagonal", {"neg_elbo_gmm_nats", "is_nll_gmm_nats"}),
        (conditional_run, "metrics=lnc", {"lnc"}),
        (spatial_run, "metrics=viv,sec,lattice,lnc", {"viv", "sec", "lattice"}),
    ):
        words = (*keys.split(), "batch_size=2")
        one, out = results(run, tmp_path / "1.json", *words), tmp_path / "2.json"
        assert run_ranks(2, evaluate.main, keys_of(run, f"out={out}", *words)) == [0, 0]
        assert json.loads(out.read_text())["figures"] == pytest.approx(one["figures"], rel=1e-5)
        assert one["figures"].keys() >= names
    assert 0 <= one["figures"]["lattice"] <= 1 and "two classes" in one["notes"]["lnc"]
    assert (tmp_path / "1_lattice.png").stat().st_size > 1000
    # nearly the same of stored latents, which are of images without noise
    stored = (f"data={spatial_run.parent}/images", "dtype=fp32", "content=mean")
    assert encode.main(keys_of(spatial_run, f"out={tmp_path}/latents", *stored)) == 0
    keys = ("metrics=sec,viv", f"latents={tmp_path}/latents")
    of_latents = results(spatial_run, tmp_path / "l.json", *keys)["figures"]
    assert of_latents == pytest.approx({k: one["figures"][k] for k in ("viv", "sec")}, rel=0.05)


def test_the_statistics_of_a_spatial_latent_are_of_the_run_as_it_stands(spatial_run, tmp_path):
    assert evaluate.main(keys_of(spatial_run)) == 0
    statistics = json.loads((spatial_run / "latents.json").read_text())
    pixels = torch.from_numpy(random_pixels(3, 20, 16, 3)).permute(0, 3, 1, 2)
    mean, std = vae_dist.load(spatial_run, device="cpu").encode(pixels)
    total = float(mean.var(correction=0) + std.square().mean())
    of_channels = (mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))).sqrt().tolist()
    # evaluation encodes dequantised images, as training does
    assert statistics["scaling_factor"] == pytest.approx(total**-0.5, rel=1e-2)
    assert statistics["per_channel"]["std"] == pytest.approx(of_channels, rel=1e-2)
    assert statistics["num_images"] == 3
    for key in ("checkpoint=10", "weights=model", f"out={tmp_path}/r.json"):  # no news of the run
        assert evaluate.main(keys_of(spatial_run, key)) == 0
    assert json.loads((spatial_run / "latents.json").read_text()) == statistics
