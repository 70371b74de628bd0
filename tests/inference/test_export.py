"""From our runs to diffusers' AutoencoderKL and FLUX.2's, with the real package."""

import json
import os

import pytest
import safetensors
import torch

from tests.support.tiny_run import tiny_config, write_run
from vae_dist import export
from vae_dist.config.commands import CheckpointCommand
from vae_dist.distributed import load_full
from vae_dist.inference.load import load_model
from vae_dist.models import latent
from vae_dist.models.build import build_vae
from vae_dist.models.latent import LatentMoments
from vae_dist.randomness import torch_generator
from vae_dist.run.resume import initial_weights

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test asks the Hub
diffusers = pytest.importorskip("diffusers")
EXACT = {"rtol": 0, "atol": 1e-5}


def spatial_config(source="", **model):
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    config.init_from = str(source)
    options = {"channels": [8, 12, 12], "attention": True, "latent_channels": 4, **model}
    for name, value in options.items():
        setattr(config.model, name, value)
    return config


def exported(run, out, *keys):
    assert export.main([f"run={run}", f"out={out}", *keys]) == 0
    return out


def settings_of(out):
    return json.loads((out / "config.json").read_text())


def loaded(run, **keys):
    return load_model(CheckpointCommand(run=str(run), **keys)).model


def images(number=2, size=(16, 24)):
    return torch.rand(number, 3, *size, generator=torch_generator(0, "pixels")) * 2 - 1


@torch.no_grad()
def assert_same(ours, theirs):
    """Means, log-variances and decoded images agree for images of several sizes."""
    for size in ((16, 16), (24, 32), (8, 40)):
        mean, log_variance = ours.encode(images(size=size))
        found = theirs.encode(images(size=size)).latent_dist
        assert mean.std() > 0.01
        torch.testing.assert_close(found.mean, mean, **EXACT)
        unclamped = found.parameters.chunk(2, dim=1)[1]
        torch.testing.assert_close(latent.bounded(unclamped), log_variance, rtol=0, atol=2e-5)
        usual = (unclamped > -20) & (unclamped < 10)
        assert usual.any() and (found.logvar - log_variance)[usual].abs().max() < 2e-4
        z = mean + torch.randn(mean.shape, generator=torch_generator(0, "z"))
        expected = ours.decode(z, size)[:, :3]
        assert expected.std() > 0.01
        torch.testing.assert_close(theirs.decode(z).sample, expected, **EXACT)


@pytest.mark.parametrize(
    ("channels", "attention"), [([8], True), ([8, 12, 12], False), ([8, 8, 16, 24], True)]
)
def test_an_exported_run_is_the_same_model(tmp_path, channels, attention, capsys):
    options = {"channels": channels, "attention": attention, "latent_channels": 5, "blocks": 2}
    config = spatial_config(**options)
    config.likelihood.variance = "shared" if attention else "per_pixel"
    write_run(tmp_path / "run", config, (16, 24))
    weights = "ema" if attention else "model"
    out = exported(tmp_path / "run", tmp_path / "out", f"weights={weights}")
    assert ("cut off: 3 decoder outputs" in capsys.readouterr().out) == (not attention)
    theirs = diffusers.AutoencoderKL.from_pretrained(out).eval()
    assert_same(loaded(tmp_path / "run", weights=weights), theirs)


def test_what_the_format_has_no_place_for_is_named(tmp_path, capsys):
    config = spatial_config(patch=2, dc_shortcuts=True, num_classes=4, blocks=[1, 1, 2])
    config.likelihood.kind = "discretized_logistic_mixture"
    config.data.mask = "member"
    write_run(tmp_path / "run", config, (16, 16))
    write_run(tmp_path / "vector", tiny_config(channels=1), (16, 16))
    named = ("patch=2", "dc_shortcuts=true", "num_classes=4", "blocks=[1, 1, 2]", "mask=member")
    for run, keys in (
        ("run", (*named, "kind=discretized_logistic_mixture", "format=safetensors writes any")),
        ("vector", ("model.latent=vector", "likelihood.kind=bernoulli")),
    ):
        assert export.main([f"run={tmp_path}/{run}", f"out={tmp_path}/out"]) == 2
        errors = capsys.readouterr().err
        assert all(key in errors for key in keys)
    assert not (tmp_path / "out").exists()


def test_one_file_of_any_model_begins_another_run(plain_run, tmp_path, capsys, monkeypatch):
    """And is pushed."""
    calls = []

    class Api:
        def create_repo(self, repo, *, exist_ok):
            calls.append((repo, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, allow_patterns):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    out = exported(plain_run, tmp_path / "out", "format=safetensors", "push=me/model")
    assert calls == [("me/model", True), ("me/model", ["model.safetensors"])]
    assert "pushed: https://hub/commit" in capsys.readouterr().out
    with safetensors.safe_open(out / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["step"]) == 20 and metadata["likelihood"] == "bernoulli"
    assert json.loads(metadata["config"])["model"]["channels"] == [8, 8]
    assert "shards" not in metadata["config"]  # no paths
    config = tiny_config()
    config.init_from = str(out)
    model = build_vae(config, (28, 28))
    load_full(model, initial_weights(config, model))
    assert torch.equal(model.encoder.conv_in.weight, loaded(plain_run).encoder.conv_in.weight)
    checkpoint = max((plain_run / "checkpoints").glob("step_*"))
    for out in (plain_run, checkpoint):
        assert export.main([f"run={plain_run}", f"out={out}", "format=safetensors"]) == 2
        assert "holds the run or its checkpoints" in capsys.readouterr().err


# latents, normalised as diffusers' own pipelines do it


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run that knows the moments of the latents of `images(8)`."""
    folder = tmp_path_factory.mktemp("normalization") / "run"
    write_run(folder, spatial_config(channels=[8, 8]), (16, 16))
    moments = LatentMoments(4)
    with torch.no_grad():
        moments.add(*loaded(folder).encode(images(8)))
    (folder / "latents.json").write_text(json.dumps(moments.statistics() | {"step": 20}))
    return folder


def test_channels_have_mean_0_and_variance_1_as_sdxl_normalises_them(measured, tmp_path):
    vae = diffusers.AutoencoderKL.from_pretrained(exported(measured, tmp_path / "out")).eval()
    of_channels = vae.config.latents_mean, vae.config.latents_std
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in of_channels)
    with torch.no_grad():
        posterior = vae.encode(images(8)).latent_dist
    latents = (posterior.mean - mean) / std
    within = (posterior.std / std).square().mean((0, 2, 3))
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3 and vae.config.scaling_factor == 1
    variance = latents.var((0, 2, 3), correction=0) + within
    torch.testing.assert_close(variance, torch.ones(4), rtol=0, atol=1e-3)


def test_the_scalar_pair_stays_to_be_had(measured, tmp_path, capsys):
    record, out = json.loads((measured / "latents.json").read_text()), tmp_path / "out"
    settings = settings_of(exported(measured, out, "normalization=scalar"))
    found = settings["latents_mean"], settings["scaling_factor"], settings["shift_factor"]
    assert found == (None, record["scaling_factor"], record["shift_factor"]) and found[1] != 1.0
    assert export.main([f"run={measured}", f"out={out}/2", "format=flux2", "normalization=scalar"])
    write_run(tmp_path / "run", spatial_config(), (16, 24))
    for text, factors, said in (
        (None, (1.0, 0.0), "latents.json cannot be read"),
        (json.dumps(record | {"step": 10}), found[1:], "at step 10, the weights are of 20"),
        ('{"scaling_factor": "much"}', (1.0, 0.0), "cannot be read"),
    ):
        if text is not None:
            (tmp_path / "run" / "latents.json").write_text(text)
        settings = settings_of(exported(tmp_path / "run", out, "normalization=scalar"))
        assert (settings["scaling_factor"], settings["shift_factor"]) == factors
        assert said in capsys.readouterr().out


def test_flux2s_format_has_the_statistics_of_blocks(measured, tmp_path):
    exported(measured, tmp_path / "out", "format=flux2")
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        z = vae.encode(images(8)).latent_dist.mean
        mean, _ = loaded(measured).encode(images(8))
    torch.testing.assert_close(z, mean, rtol=0, atol=1e-5 * float(mean.abs().max()))
    latents = diffusers.Flux2Pipeline._patchify_latents(z)
    deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
    latents = (latents - vae.bn.running_mean.view(1, -1, 1, 1)) / deviation
    by_channel = latents.view(8, 4, 4, *latents.shape[2:])
    assert by_channel.mean((0, 2, 3, 4)).abs().max() < 1e-3
