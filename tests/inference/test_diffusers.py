"""To diffusers' AutoencoderKL and FLUX.2's, and from published ones, with the real package."""

import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch

import vae_dist
from tests.support.tiny_run import tiny_config, write_run
from vae_dist import export
from vae_dist.config.errors import ConfigError
from vae_dist.distributed import load_full
from vae_dist.models import latent
from vae_dist.models.build import build_vae
from vae_dist.models.diffusers import local_source, read_published
from vae_dist.models.latent import LatentMoments
from vae_dist.randomness import torch_generator
from vae_dist.run.resume import initial_weights

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test asks the Hub
diffusers = pytest.importorskip("diffusers")
WIDTHS = [8, 12, 16]
EXACT = {"rtol": 0, "atol": 1e-5}


def spatial_config(source="", **model):
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    config.init_from = str(source)
    options = {"channels": WIDTHS, "attention": True, "latent_channels": 4, **model}
    for name, value in options.items():
        setattr(config.model, name, value)
    return config


def exported(run, out, *keys):
    assert export.main([f"run={run}", f"out={out}", *keys]) == 0
    return out


def loaded(run, **keys):
    return vae_dist.load(run, device="cpu", **keys).model


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


# ours -> diffusers


@pytest.mark.parametrize(
    ("channels", "attention"), [([8], True), ([8, 12, 12], False), ([8, 8, 16, 24], True)]
)
def test_an_exported_run_is_the_same_model(tmp_path, channels, attention, capsys):
    config = spatial_config(channels=channels, attention=attention, latent_channels=5, blocks=2)
    config.likelihood.variance = "shared" if attention else "per_pixel"
    write_run(tmp_path / "run", config, (16, 24))
    weights = "ema" if attention else "model"
    out = exported(tmp_path / "run", tmp_path / "out", f"weights={weights}")
    assert ("cut off: 3 decoder outputs" in capsys.readouterr().out) == (not attention)
    theirs = diffusers.AutoencoderKL.from_pretrained(out).eval()
    assert_same(loaded(tmp_path / "run", weights=weights), theirs)


def test_what_the_format_has_no_place_for_is_named(tmp_path, capsys):
    config = spatial_config(patch=2, num_classes=4, blocks=[1, 1, 2])
    config.model.latent, config.model.dc_shortcuts = "vector", True
    config.likelihood.kind, config.data.mask = "discretized_logistic_mixture", "member"
    write_run(tmp_path / "run", config, (16, 16))
    assert export.main([f"run={tmp_path}/run", f"out={tmp_path}/out"]) == 2
    errors = capsys.readouterr().err
    named = "patch=2 dc_shortcuts=true num_classes=4 model.blocks=[1, mask=member latent=vector"
    for key in (*named.split(), "discretized_logistic_mixture", "format=safetensors writes any"):
        assert key in errors
    assert not (tmp_path / "out").exists()


def test_one_file_of_any_model_begins_another_run(plain_run, tmp_path, capsys, monkeypatch):
    """And is pushed."""
    api = Mock()
    api.upload_folder.return_value.commit_url = "https://hub/commit"
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    out = exported(plain_run, tmp_path / "out", "format=safetensors", "push=me/model")
    api.create_repo.assert_called_once_with("me/model", exist_ok=True)
    pushed = api.upload_folder.call_args.kwargs
    assert (pushed["repo_id"], pushed["folder_path"]) == ("me/model", out)
    assert "pushed: https://hub/commit" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    with safetensors.safe_open(out / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["step"]) == 20 and metadata["likelihood"] == "bernoulli"
    assert json.loads(metadata["config"])["model"]["channels"] == [8, 8]
    assert "shards" not in metadata["config"]  # no paths
    config = tiny_config()
    config.init_from = str(out)
    weights = initial_weights(config, build_vae(config, (28, 28)))
    torch.testing.assert_close(weights, dict(loaded(plain_run).state_dict()), rtol=0, atol=0)
    for out in (plain_run, *(plain_run / "checkpoints").glob("step_*")):
        assert export.main([f"run={plain_run}", f"out={out}", "format=safetensors"]) == 2
        assert "holds the run or its checkpoints" in capsys.readouterr().err


def test_latents_are_normalised_as_diffusers_pipelines_do_it(tmp_path, capsys):
    """By what was measured: of channels (SDXL), of all values (SD), or of blocks (FLUX.2)."""
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run, spatial_config(channels=[8, 8]), (16, 16))
    moments = LatentMoments(4)
    with torch.no_grad():
        mean, log_variance = loaded(run).encode(images(8))
    moments.add(mean, log_variance)
    record = moments.statistics() | {"step": 20}
    (run / "latents.json").write_text(json.dumps(record))

    config = diffusers.AutoencoderKL.from_pretrained(exported(run, out)).config
    centre, std = (torch.tensor(config[f"latents_{name}"]) for name in ("mean", "std"))
    assert config["scaling_factor"] == 1
    torch.testing.assert_close(mean.mean((0, 2, 3)), centre)
    variance = mean.var((0, 2, 3), correction=0) + log_variance.exp().mean((0, 2, 3))
    torch.testing.assert_close(variance, std.square())

    vae = diffusers.AutoencoderKLFlux2.from_pretrained(exported(run, out, "format=flux2"))
    blocks = diffusers.Flux2Pipeline._patchify_latents(mean)
    deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
    blocks = (blocks - vae.bn.running_mean.view(1, -1, 1, 1)) / deviation
    of_channels = blocks.view(8, 4, 4, *blocks.shape[2:])
    assert of_channels.mean((0, 2, 3, 4)).abs().max() < 1e-3
    torch.testing.assert_close(deviation.view(4, 4), std.unsqueeze(1).expand(4, 4))

    scalar = record["scaling_factor"], record["shift_factor"]
    assert scalar[0] != 1
    for text, factors, said in (
        (json.dumps(record), scalar, "from"),
        (json.dumps(record | {"step": 10}), scalar, "at step 10, the weights are of 20"),
        ('{"scaling_factor": "much"}', (1.0, 0.0), "latents.json cannot be read"),
    ):
        (run / "latents.json").write_text(text)
        exported(run, out, "normalization=scalar")
        settings = json.loads((out / "config.json").read_text())
        assert (settings["scaling_factor"], settings["shift_factor"]) == factors
        assert settings["latents_mean"] is None and said in capsys.readouterr().out


# diffusers -> ours


def published(folder, kind="AutoencoderKL", **options):
    torch.manual_seed(0)
    widths = options.pop("widths", WIDTHS)
    model = getattr(diffusers, kind)(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=1,
        norm_num_groups=4,
        **{"latent_channels": 4, **options},
    ).eval()
    with torch.no_grad():  # biases that are zero would hide a lost one
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        if kind == "AutoencoderKLFlux2":
            model.bn.running_mean.copy_(torch.randn(16))
            model.bn.running_var.copy_(torch.rand(16) + 0.5)
    model.save_pretrained(folder)
    return model


def flux2(folder):
    return published(folder, "AutoencoderKLFlux2", widths=[8, 12], sample_size=32)


def begun(config):
    ours = build_vae(config, (16, 16))
    likelihood = {k: v for k, v in ours.state_dict().items() if k.startswith("likelihood.")}
    with torch.device("meta"):
        shapes = build_vae(config, (16, 16))
    load_full(ours, initial_weights(config, shapes))
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in likelihood.items())
    return ours


FLUX = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


@pytest.mark.parametrize(
    ("options", "variance"),
    [({}, "shared"), ({}, "per_pixel"), (FLUX, "fixed"), ({"mid_block_add_attention": False}, "")],
)
def test_a_published_model_is_the_same_here(tmp_path, options, variance):
    theirs = published(tmp_path / "pipeline" / "vae", **options)
    attention = options.get("mid_block_add_attention", True)
    fitting = {"latent_channels": options.get("latent_channels", 4), "attention": attention}
    config = spatial_config(tmp_path / "pipeline", **fitting)
    config.likelihood.variance = variance or "per_channel"
    assert_same(begun(config), theirs)


def test_old_names_and_half_precision_are_read(tmp_path):
    theirs = published(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    before = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in safetensors.torch.load_file(file).items():
        for now in (now for now in before if f".{now}." in name):
            name = name.replace(now, before[now])
            tensor = tensor[:, :, None, None] if name.endswith("weight") else tensor
        old[name] = tensor.half()
    assert any("proj_attn" in name for name in old)
    file.unlink()
    safetensors.torch.save_file(old, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert_same(begun(spatial_config(tmp_path)), theirs.half().float())


def test_a_model_of_another_shape_is_refused_with_the_keys_that_fit(tmp_path):
    published(tmp_path)
    for keys, kind, first, last in (
        ({"latent_channels": 3}, "gaussian", "16x4x3x3 -> 16x3x3x3", "latent_channels=4"),
        # what changes no shape changes the model all the same
        ({"norm_groups": 2}, "gaussian", "0 of its tensors", "model.norm_groups=4"),
        ({}, "discretized_logistic_mixture", "which likelihood", ""),
    ):
        config = spatial_config(tmp_path, **keys)
        config.likelihood.kind = kind
        with pytest.raises(ConfigError) as caught:
            initial_weights(config, build_vae(config, (16, 16)))
        assert first in str(caught.value) and last in caught.value.problems[-1]


def test_pickles_and_strangers_are_refused(tmp_path):
    published(tmp_path)
    file, settings = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    pickle = tmp_path / "diffusion_pytorch_model.bin"
    pickle.write_bytes(file.read_bytes())
    assert read_published(tmp_path) and read_published(file)  # the safetensors beside it
    known = json.loads(settings.read_text())
    for forged, fragment in (
        ({"_class_name": "AutoencoderTiny"}, "a diffusers AutoencoderTiny; only AutoencoderKL"),
        ({"block_out_channels": "wide"}, "our towers have"),
        ({"block_out_channels": [8, 12, 2**24]}, "do not fit"),
    ):
        settings.write_text(json.dumps(known | forged))
        with pytest.raises(ConfigError, match=fragment):
            vae_dist.load(tmp_path)
    settings.write_text(json.dumps(known))
    file.unlink()
    assert read_published(pickle) is read_published(tmp_path / "elsewhere") is None
    with pytest.raises(ConfigError, match=r"has no diffusion_pytorch_model\.safetensors; other"):
        read_published(tmp_path)


def test_flux2_is_the_same_here_and_after_another_export(tmp_path):
    theirs = flux2(tmp_path / "vae")
    vae = vae_dist.load(tmp_path / "vae", device="cpu")
    assert_same(vae.model, theirs)
    with pytest.raises(ValueError, match="no likelihood"):
        vae.neg_elbo(vae.sample(1))
    norm, bn = read_published(tmp_path / "vae").norm, theirs.bn
    mean, variance = bn.running_mean.view(4, 4), bn.running_var.view(4, 4) + 1e-4
    # of all positions of a channel, the spread between the means of a block included
    std = (variance.mean(1) + mean.var(1, correction=0)).sqrt()
    expected = torch.stack([mean.mean(1), std])
    torch.testing.assert_close(torch.tensor((norm.mean, norm.std)), expected)
    # decoders that are trained alone, one after the other, keep the published numbers
    for source, run in (("vae", "first"), ("first", "second")):
        config = spatial_config(tmp_path / source, channels=[8, 12])
        config.training.train_only = "decoder"
        write_run(tmp_path / run, config, (16, 16))
    out = exported(tmp_path / "second", tmp_path / "out", "format=flux2")
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(out)
    torch.testing.assert_close(vae.bn.state_dict(), bn.state_dict(), rtol=1e-6, atol=0)


def test_published_factors_are_not_lost(tmp_path):
    """(z - latents_mean) / latents_std * scaling_factor, as published ones have it."""
    published(tmp_path, latents_mean=[1.0] * 4, latents_std=[2.0] * 4, scaling_factor=0.5)
    settings = read_published(tmp_path).norm.settings("channel")
    assert (settings["scaling_factor"], settings["latents_std"]) == (1.0, [4.0] * 4)
    # one that is not said is the default of diffusers, as in Stable Diffusion's first autoencoders
    known = json.loads((tmp_path / "config.json").read_text())
    del known["scaling_factor"], known["latents_mean"], known["latents_std"]
    (tmp_path / "config.json").write_text(json.dumps(known))
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path).config
    settings = read_published(tmp_path).norm.settings("scalar")
    assert settings["scaling_factor"] == theirs.scaling_factor == 0.18215
    assert not settings["shift_factor"] and settings["latents_mean"] is None


def test_an_address_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", Mock(side_effect=OSError("no network")))
    repository, commit = tmp_path / "models--me--pipeline", 40 * "a"
    flux2(repository / "snapshots" / commit / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for address in ("hf://me/pipeline", "hf://me/pipeline/vae", "hf://me/pipeline/vae/"):
        assert read_published(local_source(address)).config["latent_channels"] == 4
    for address in ("hf://me/other", "hf://me"):
        with pytest.raises(ConfigError, match="cannot be read from the Hugging Face Hub"):
            local_source(address)
    assert local_source("runs/mnist") == Path("runs/mnist")
