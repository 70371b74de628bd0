"""Both ways between our runs and diffusers' AutoencoderKL, with the real package."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from tests.support.tiny_run import tiny_config, write_run
from vae_dist import export
from vae_dist.config.commands import CheckpointCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.distributed import load_full
from vae_dist.inference.load import load_model
from vae_dist.models import latent
from vae_dist.models.build import build_vae
from vae_dist.models.diffusers import read_published
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator
from vae_dist.run.resume import initial_weights

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test asks the Hub
diffusers = pytest.importorskip("diffusers")
SIZES = [(16, 16), (24, 32), (8, 40)]
EXACT = {"rtol": 0, "atol": 1e-5}
Printed = pytest.CaptureFixture[str]


def spatial_config(source: Path | str = "", **model: object) -> TrainConfig:
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    config.init_from = str(source)
    config.model.channels = [8, 12, 12]
    config.model.attention = True
    for name, value in model.items():
        setattr(config.model, name, value)
    return config


def run_of(folder: Path, **model: object) -> Path:
    write_run(folder, spatial_config(**model), (16, 24))
    return folder


def exported(run: Path, out: Path, *keys: str) -> Path:
    assert export.main([f"run={run}", f"out={out}", *keys]) == 0
    return out


def assert_same(ours: VAE, theirs: Any, size: tuple[int, int]) -> None:
    """Means, log-variances and decoded images agree for images of this size."""
    images = torch.rand(2, 3, *size, generator=torch_generator(0, "pixels")) * 2 - 1
    with torch.no_grad():
        mean, log_variance = ours.encode(images)
        found = theirs.encode(images).latent_dist
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


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("channels", [[8], [8, 12, 12], [8, 8, 16, 24]])
def test_an_exported_run_is_the_same_model(
    tmp_path: Path, channels: list[int], attention: bool
) -> None:
    options = {"channels": channels, "attention": attention, "latent_channels": 5, "blocks": 2}
    run = run_of(tmp_path / "run", **options)
    theirs = diffusers.AutoencoderKL.from_pretrained(exported(run, tmp_path / "out")).eval()
    ours = load_model(CheckpointCommand(run=str(run))).model
    for size in SIZES:
        assert_same(ours, theirs, size)


def test_a_variance_for_each_pixel_is_cut_off(tmp_path: Path, capsys: Printed) -> None:
    config = spatial_config()
    config.likelihood.variance = "per_pixel"
    run = write_run(tmp_path / "run", config, (16, 16)).path
    out = exported(run, tmp_path / "out", "weights=model")
    assert "cut off: 3 of 6 decoder outputs" in capsys.readouterr().out
    theirs = diffusers.AutoencoderKL.from_pretrained(out).eval()
    command = CheckpointCommand(run=str(run), weights="model")
    assert_same(load_model(command).model, theirs, (16, 24))


def test_what_the_format_has_no_place_for_is_named(tmp_path: Path, capsys: Printed) -> None:
    config = spatial_config(patch=2, dc_shortcuts=True, num_classes=4, blocks=[1, 1, 2])
    config.model.latent_channels = 4
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


def test_factors_come_from_the_measured_latents(tmp_path: Path, capsys: Printed) -> None:
    run = run_of(tmp_path / "run")
    for record, factors, said in (
        (None, (1.0, 0.0), "latents.json is not there"),
        (
            '{"scaling_factor": 0.5, "shift_factor": -0.25, "step": 10}',
            (0.5, -0.25),
            "measured at step 10, the weights are of 20",
        ),
        ('{"scaling_factor": "much"}', (1.0, 0.0), "cannot be read"),
    ):
        if record is not None:
            (run / "latents.json").write_text(record)
        out = exported(run, tmp_path / "out", "normalization=scalar")
        written = json.loads((out / "config.json").read_text())
        assert (written["scaling_factor"], written["shift_factor"]) == factors
        assert said in capsys.readouterr().out


def test_one_file_of_any_model_begins_another_run(tmp_path: Path, capsys: Printed) -> None:
    config = tiny_config()
    run = write_run(tmp_path / "run", config, (8, 6)).path
    file = exported(run, tmp_path / "out", "format=safetensors") / "model.safetensors"
    assert "latents.json" not in capsys.readouterr().out  # nothing measures a vector latent
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["step"]) == 20 and metadata["likelihood"] == "bernoulli"
    assert json.loads(metadata["config"])["model"]["channels"] == [8, 8]
    assert "shards" not in metadata["config"]  # no paths
    config.init_from = str(file)
    model = build_vae(config, (8, 6))
    load_full(model, initial_weights(config, model))
    ours = load_model(CheckpointCommand(run=str(run))).model
    assert torch.equal(model.encoder.conv_in.weight, ours.encoder.conv_in.weight)


def test_nothing_but_an_export_is_written_over(tmp_path: Path, capsys: Printed) -> None:
    run, out = run_of(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    assert export.main([f"run={run}", f"out={out}"]) == 2
    assert "holds README.md, but no diffusion_pytorch_model" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "mine"
    (out / "README.md").unlink()
    for _ in range(2):
        exported(run, out)
    checkpoint = max((run / "checkpoints").glob("step_*"))
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert export.main([f"run={run}", f"out={checkpoint}", "format=safetensors"]) == 2
    assert "is among the checkpoints" in capsys.readouterr().err
    assert (checkpoint / "model.safetensors").read_bytes() == weights


def test_a_push_uploads_what_was_written(
    spatial_run: Path, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Api:
        def __init__(self, token: str) -> None:
            assert token == "secret"

        def create_repo(self, repo: str, *, exist_ok: bool) -> None:
            calls.append(("create", repo, exist_ok))

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: object) -> object:
            calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    keys = [f"run={spatial_run}", f"out={tmp_path}/out"]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for push, reason in (("me/model", "there is no login"), ("a/b/c", "give OWNER/NAME")):
        assert export.main([*keys, f"push={push}"]) == 2
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "out").exists()  # refused before any work
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert export.main([*keys, "push=me/model"]) == 0
    names = ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert calls == [("create", "me/model", True), ("upload", "me/model", names)]
    text = capsys.readouterr().out
    assert "pushed: https://hub/commit" in text and "secret" not in text


# the other way


def published(folder: Path, **options: object) -> Any:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 12, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **{"latent_channels": 4, **options},
    ).eval()
    with torch.no_grad():  # biases that are zero would hide a lost one
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


def fitting_config(source: Path, **model: object) -> TrainConfig:
    return spatial_config(source, channels=[8, 12, 16], **{"latent_channels": 4, **model})


FLUX = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


@pytest.mark.parametrize("options", [{}, FLUX, {"mid_block_add_attention": False}])
@pytest.mark.parametrize("variance", ["shared", "per_pixel", "fixed"])
def test_a_published_model_is_the_same_here(
    tmp_path: Path, options: dict[str, Any], variance: Any
) -> None:
    theirs = published(tmp_path / "pipeline" / "vae", **options)
    attention = options.get("mid_block_add_attention", True)
    fitting = {"latent_channels": options.get("latent_channels", 4), "attention": attention}
    config = fitting_config(tmp_path / "pipeline", **fitting)
    config.likelihood.variance = variance
    with torch.device("meta"):
        shapes = build_vae(config, (16, 16))
    weights = initial_weights(config, shapes)
    ours = build_vae(config, (16, 16))
    likelihood = {k: v for k, v in ours.state_dict().items() if k.startswith("likelihood.")}
    load_full(ours, weights)
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in likelihood.items())
    for size in SIZES:
        assert_same(ours, theirs, size)


def test_old_names_and_half_precision_are_read(tmp_path: Path) -> None:
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
    config = fitting_config(tmp_path)
    ours = build_vae(config, (16, 16))
    load_full(ours, initial_weights(config, ours))
    assert_same(ours, theirs.half().float(), (16, 24))


def test_a_model_of_another_shape_is_refused_with_the_keys_that_fit(tmp_path: Path) -> None:
    published(tmp_path)

    def problems(config: TrainConfig) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            initial_weights(config, build_vae(config, (16, 16)))
        return caught.value.problems

    found = problems(spatial_config(tmp_path, norm_groups=2, blocks=[1, 1, 2]))
    assert "  decoder.conv_in.weight: 16x4x3x3 -> 12x3x3x3" in found
    assert any("... and" in line for line in found)
    keys = ("channels=[8,12,16]", "latent_channels=4", "norm_groups=4", "blocks=1")
    assert all(f"'model.{key}'" in found[-1] for key in keys)
    # what changes no shape changes the model all the same
    first, *_, last = problems(fitting_config(tmp_path, norm_groups=2))
    assert "0 of its tensors differ" in first and "model.norm_groups=4" in last
    config = fitting_config(tmp_path)
    config.likelihood.kind = "discretized_logistic_mixture"
    assert "which likelihood.kind=discretized" in problems(config)[0]


def test_pickles_and_strangers_are_refused(tmp_path: Path) -> None:
    published(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    pickle = tmp_path / "diffusion_pytorch_model.bin"
    pickle.write_bytes(file.read_bytes())
    assert read_published(tmp_path) is not None  # the safetensors beside it
    assert read_published(file) is not None
    file.unlink()
    for source in (tmp_path, pickle):
        with pytest.raises(ConfigError, match=r"model\.bin is a pickle, which can run code"):
            read_published(source)
    pickle.unlink()
    with pytest.raises(ConfigError, match=r"has no diffusion_pytorch_model\.safetensors"):
        read_published(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(ConfigError, match="a diffusers AutoencoderTiny"):
        read_published(tmp_path)
    assert read_published(tmp_path / "elsewhere") is None
