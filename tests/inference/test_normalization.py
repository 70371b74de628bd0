"""Latents of exports, normalised as diffusers' own pipelines do it, and FLUX.2's format."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tests.support.tiny_run import tiny_config, write_run
from vae_dist import export
from vae_dist.config.commands import RunCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.inference.load import load_model, load_published
from vae_dist.models.diffusers import local_source, read_published
from vae_dist.models.latent import LatentMoments
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip("diffusers")
CPU = torch.device("cpu")
SCALES = torch.tensor([100.0, 1.0, 2.0, 1.0]).view(4, 1, 1)  # of the latents' channels


def config_with_attention() -> TrainConfig:
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    config.model.latent_channels, config.model.attention = 4, True
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose channels of latents differ by 100, with their measured statistics."""
    folder = tmp_path_factory.mktemp("normalization") / "run"
    write_run(folder, config_with_attention(), (16, 16))
    for file in folder.glob("checkpoints/*/*.safetensors"):
        _scale_means(file)
    model = load_model(RunCommand(run=str(folder), device="cpu")).model
    moments = LatentMoments(4)
    moments.add(*encoded(model))
    record = moments.statistics().record()
    (folder / "latents.json").write_text(json.dumps(record | {"step": 20}))
    return folder


def _scale_means(file: Path) -> None:
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("quant_conv.weight") and "post" not in name:
            tensor[:4] *= SCALES.view(4, 1, 1, 1) / tensor[:4].std()
    safetensors.torch.save_file(tensors, file, metadata)  # of the same size


def images() -> Tensor:
    return torch.rand(8, 3, 16, 24, generator=torch_generator(0, "pixels")) * 2 - 1


@torch.no_grad()
def encoded(model: VAE) -> tuple[Tensor, Tensor]:
    return model.encode(images())


def exported(run: Path, out: Path, *keys: str) -> dict[str, object]:
    assert export.main([f"run={run}", f"out={out}", *keys]) == 0
    settings: dict[str, object] = json.loads((out / "config.json").read_text())
    return settings


def assert_standard(latents: Tensor) -> None:
    """Mean 0 and variance 1 in each channel, but for the posterior's own variance."""
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert 0.9 < float(latents.std((0, 2, 3)).min()) <= float(latents.std((0, 2, 3)).max()) < 1.01


def test_channels_are_normalised_and_back_as_sdxl_does_it(run: Path, tmp_path: Path) -> None:
    settings = exported(run, tmp_path / "out")
    assert settings["scaling_factor"] == 1.0
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        z = vae.encode(images()).latent_dist.mean
        mean = torch.tensor(vae.config.latents_mean).view(1, 4, 1, 1)
        std = torch.tensor(vae.config.latents_std).view(1, 4, 1, 1)
        latents = (z - mean) / std * vae.config.scaling_factor
        assert_standard(latents)
        back = latents * std / vae.config.scaling_factor + mean  # StableDiffusionXLPipeline
        decoded = vae.decode(back).sample.clamp(-1, 1)  # as its image processor
        model = load_model(RunCommand(run=str(run), device="cpu")).model
        expected = model.likelihood.mean(model.decode(encoded(model)[0], (16, 24)))
    torch.testing.assert_close(decoded, expected, rtol=0, atol=2e-5)


def test_the_scalar_pair_stays_to_be_had(run: Path, tmp_path: Path) -> None:
    settings = exported(run, tmp_path / "out", "normalization=scalar")
    assert settings["latents_mean"] is None and settings["scaling_factor"] != 1.0
    measured = json.loads((run / "latents.json").read_text())
    assert settings["scaling_factor"] == measured["scaling_factor"]
    assert export.main([f"run={run}", f"out={tmp_path}/o", "format=flux2", "normalization=scalar"])


def packed(z: Tensor) -> Tensor:
    return diffusers.Flux2Pipeline._patchify_latents(z)


def test_flux2s_format_has_the_statistics_of_blocks(run: Path, tmp_path: Path) -> None:
    exported(run, tmp_path / "out", "format=flux2")
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        z = vae.encode(images()).latent_dist.mean
        mean, _ = encoded(load_model(RunCommand(run=str(run), device="cpu")).model)
        torch.testing.assert_close(z, mean, rtol=0, atol=1e-5 * float(mean.abs().max()))
        latents = packed(z)
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
        latents = (latents - vae.bn.running_mean.view(1, -1, 1, 1)) / deviation
    by_channel = latents.view(8, 4, 4, *latents.shape[2:]).mean((0, 2, 3, 4))
    assert by_channel.abs().max() < 1e-3


def flux2(folder: Path, **options: object) -> object:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 12),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        **options,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        model.bn.running_mean.copy_(torch.randn(16))
        model.bn.running_var.copy_(torch.rand(16) + 0.5)
    model.save_pretrained(folder)
    return model


def test_flux2_is_the_same_here_and_after_another_export(tmp_path: Path) -> None:
    theirs = flux2(tmp_path / "vae")
    loaded = load_published(tmp_path / "vae", CPU)
    assert loaded is not None
    with torch.no_grad():
        mean, _ = loaded.model.encode(images())
        z = theirs.encode(images()).latent_dist.mean  # type: ignore[attr-defined]
        torch.testing.assert_close(mean, z, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            loaded.model.decode(z, (16, 24))[:, :3],
            theirs.decode(z).sample,  # type: ignore[attr-defined]
            rtol=0,
            atol=1e-5,
        )
    published = read_published(tmp_path / "vae")
    assert published is not None
    again = published.norm.packed(4)
    bn = theirs.bn  # type: ignore[attr-defined]
    means = bn.running_mean.view(4, 4).mean(1).repeat_interleave(4)
    torch.testing.assert_close(again["bn.running_mean"], means)
    # the variance of all positions of a channel, between the means of a block included
    spread = (bn.running_mean.view(4, 4) - bn.running_mean.view(4, 4).mean(1, True)).square()
    total = (bn.running_var.view(4, 4) + spread).mean(1).repeat_interleave(4)
    torch.testing.assert_close(again["bn.running_var"], total)


def test_a_decoder_that_was_trained_alone_keeps_the_published_numbers(tmp_path: Path) -> None:
    theirs = flux2(tmp_path / "vae")
    config = config_with_attention()
    config.model.channels, config.model.norm_groups = [8, 12], 4
    config.init_from, config.training.train_only = str(tmp_path / "vae"), "decoder"
    write_run(tmp_path / "run", config, (16, 16))
    exported(tmp_path / "run", tmp_path / "out", "format=flux2")
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path / "out")
    expected = theirs.bn.running_mean.view(4, 4).mean(1)  # type: ignore[attr-defined]
    torch.testing.assert_close(vae.bn.running_mean.view(4, 4).mean(1), expected)
    assert vae.bn.running_var.std() > 0.01


def test_an_address_of_the_hub_is_read_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--me--pipeline", 40 * "a"
    flux2(repository / "snapshots" / commit / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for address in ("hf://me/pipeline", "hf://me/pipeline/vae", "hf://me/pipeline/vae/"):
        published = read_published(local_source(address))
        assert published is not None and published.config["latent_channels"] == 4
    for address in ("hf://me/other", "hf://me", "hf://me/pipeline/unet"):
        with pytest.raises(ConfigError, match="cannot be read from the Hugging Face Hub"):
            local_source(address)
    assert local_source("runs/mnist") == Path("runs/mnist")


def test_a_decoder_of_other_widths_is_refused(tmp_path: Path) -> None:
    flux2(tmp_path, decoder_block_out_channels=(12, 16))
    with pytest.raises(ConfigError, match="decoder_block_out_channels"):
        read_published(tmp_path)
