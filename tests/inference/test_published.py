"""From published autoencoders in diffusers' formats to our models, with the real package."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.inference.test_export import (
    EXACT,
    assert_same,
    diffusers,
    exported,
    images,
    spatial_config,
)
from tests.support.tiny_run import write_run
from vae_dist.config.errors import ConfigError
from vae_dist.distributed import load_full
from vae_dist.inference.load import load_published
from vae_dist.models.build import build_vae
from vae_dist.models.diffusers import local_source, read_published
from vae_dist.run.resume import initial_weights

WIDTHS = [8, 12, 16]


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


def flux2(folder, **options):
    return published(folder, "AutoencoderKLFlux2", widths=[8, 12], sample_size=32, **options)


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
    fitting = {"latent_channels": options.get("latent_channels", 4), "channels": WIDTHS}
    attention = options.get("mid_block_add_attention", True)
    config = spatial_config(tmp_path / "pipeline", attention=attention, **fitting)
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
    assert_same(begun(spatial_config(tmp_path, channels=WIDTHS)), theirs.half().float())


def test_a_model_of_another_shape_is_refused_with_the_keys_that_fit(tmp_path):
    published(tmp_path)
    for keys, first, last in (
        ({"latent_channels": 3}, "conv_in.weight: 16x4x3x3 -> 16x3x3x3", "latent_channels=4"),
        # what changes no shape changes the model all the same
        ({"norm_groups": 2}, "0 of its tensors", "model.norm_groups=4"),
    ):
        config = spatial_config(tmp_path, **{"channels": WIDTHS, **keys})
        with pytest.raises(ConfigError) as caught:
            initial_weights(config, build_vae(config, (16, 16)))
        assert first in str(caught.value) and last in caught.value.problems[-1]
    config = spatial_config(tmp_path, channels=WIDTHS)
    config.likelihood.kind = "discretized_logistic_mixture"
    with pytest.raises(ConfigError, match="which likelihood"):
        initial_weights(config, build_vae(config, (16, 16)))


def test_pickles_and_strangers_are_refused(tmp_path):
    published(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    pickle = tmp_path / "diffusion_pytorch_model.bin"
    pickle.write_bytes(file.read_bytes())
    assert read_published(tmp_path) is not None  # the safetensors beside it
    assert read_published(file) is not None
    file.unlink()
    assert read_published(pickle) is None
    with pytest.raises(ConfigError, match=r"has no diffusion_pytorch_model\.safetensors; other"):
        read_published(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(ConfigError, match="a diffusers AutoencoderTiny"):
        read_published(tmp_path)
    assert read_published(tmp_path / "elsewhere") is None


def test_flux2_is_the_same_here_and_after_another_export(tmp_path):
    theirs = flux2(tmp_path / "vae")
    loaded = load_published(tmp_path / "vae", torch.device("cpu"))
    with torch.no_grad():
        mean, _ = loaded.model.encode(images())
        z = theirs.encode(images()).latent_dist.mean
        torch.testing.assert_close(mean, z, **EXACT)
        params = loaded.model.decode(z, (16, 24))[:, :3]
        torch.testing.assert_close(params, theirs.decode(z).sample, **EXACT)
    norm = read_published(tmp_path / "vae").norm
    again, bn = replace(norm, blocks=()).packed(4), theirs.bn
    by_channel = bn.running_mean.view(4, 4)
    means = by_channel.mean(1)
    torch.testing.assert_close(again["bn.running_mean"], means.repeat_interleave(4))
    # the variance of all positions of a channel, between the means of a block included
    total = (bn.running_var.view(4, 4) + (by_channel - means[:, None]).square()).mean(1)
    torch.testing.assert_close(again["bn.running_var"], total.repeat_interleave(4))
    # decoders that are trained alone, one after the other, keep the published numbers
    for source, run in (("vae", "first"), ("first", "second")):
        config = spatial_config(tmp_path / source, channels=[8, 12])
        config.training.train_only = "decoder"
        write_run(tmp_path / run, config, (16, 16))
    out = exported(tmp_path / "second", tmp_path / "out", "format=flux2")
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(out)
    torch.testing.assert_close(vae.bn.state_dict(), bn.state_dict(), rtol=1e-6, atol=0)


def test_a_factor_beside_deviations_of_channels_is_not_lost(tmp_path):
    """(z - latents_mean) / latents_std * scaling_factor, as published ones have it."""
    published(tmp_path, latents_mean=[1.0] * 4, latents_std=[2.0] * 4, scaling_factor=0.5)
    settings = read_published(tmp_path).norm.settings("channel")
    assert (settings["scaling_factor"], settings["latents_std"]) == (1.0, [4.0] * 4)
    # one that is not said is the default of diffusers, as in Stable Diffusion's first autoencoders
    published(tmp_path)
    file = tmp_path / "config.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in known.items() if k != "scaling_factor"}))
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path).config
    settings = read_published(tmp_path).norm.settings("scalar")
    assert settings["scaling_factor"] == theirs.scaling_factor == 0.18215
    assert not settings["shift_factor"] and settings["latents_mean"] is None


def test_an_address_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
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
