"""A trained model as files for other programs.

In: a loaded model and its run folder. Out: a folder with

    diffusers     config.json, diffusion_pytorch_model.safetensors:
                  loads with `diffusers.AutoencoderKL.from_pretrained(FOLDER)`
    flux2         the same for `diffusers.AutoencoderKLFlux2`
    safetensors   model.safetensors: all tensors under our names; config, step, likelihood, image
                  size as metadata

and what there is to say about it. Images are in [-1, 1] on both sides. How a diffusion model
normalises latents is said in `vae_dist.models.diffusers`; the numbers are those of the run's
`latents.json`, or of the published autoencoder whose decoder alone was trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Literal

import safetensors.torch

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.files import read_json, write_durably
from vae_dist.inference.load import LoadedModel
from vae_dist.models.diffusers import (
    AUTOENCODER,
    CONFIG_NAME,
    FLUX2,
    WEIGHTS_NAME,
    LatentNorm,
    Published,
    diffusers_config,
    export_problems,
    local_source,
    read_published,
    to_diffusers,
)
from vae_dist.models.latent import STATISTICS_FILE
from vae_dist.run.checkpoint import named_checkpoint
from vae_dist.run.folder import RunFolder

PLAIN_NAME = "model.safetensors"
STATISTICS_BYTES = 2**20
MAX_STAGES = 16  # runs that begin from one another
# what a program needs to build the model; no paths
SECTIONS = ("model", "likelihood", "objective")
DATA_KEYS = ("channels", "bits", "resolution", "dequantize", "mask")


def export_diffusers(
    loaded: LoadedModel,
    run: Path,
    out: Path,
    *,
    kind: str = AUTOENCODER,
    normalization: Literal["channel", "scalar"] = "channel",
) -> list[str]:
    """Write the folder of an AutoencoderKL or AutoencoderKLFlux2; what was cut, and how latents are
    normalised. Raises ConfigError with everything that the format has no place for, and OSError."""
    model, config, step, image_size = loaded
    if problems := export_problems(config):
        raise ConfigError(
            [
                f"format: diffusers' {kind} has no place for parts of this model:",
                *(f"  {problem}" for problem in problems),
                "format=safetensors writes any model",
            ]
        )
    norm, lines = latent_norm(run, config, step=step)
    settings = diffusers_config(config, image_size, kind=kind)
    tensors = to_diffusers(model.state_dict(), channels=config.data.channels)
    if kind == FLUX2:
        tensors |= norm.packed(model.latent_channels)
    else:
        settings |= norm.settings(normalization)
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / WEIGHTS_NAME, safetensors.torch.save(tensors, {"format": "pt"}))
    write_durably(out / CONFIG_NAME, (json.dumps(settings, indent=2) + "\n").encode())
    if extra := model.likelihood.num_params - config.data.channels:
        kind = config.likelihood.kind
        lines.append(f"cut off: {extra} decoder outputs (log-variances of {kind}); the mean stays")
    return lines


def export_safetensors(loaded: LoadedModel, run: Path, out: Path) -> list[str]:
    """Write one file with all tensors and what is known of them; what there is to say. Raises
    OSError."""
    model, config, step, image_size = loaded
    described = {part: dataclasses.asdict(getattr(config, part)) for part in SECTIONS}
    described["data"] = {name: getattr(config.data, name) for name in DATA_KEYS}
    facts, lines = {"config": described, "step": step, "image_size": image_size}, list[str]()
    if model.image_size is None:  # of a vector latent nothing is measured
        norm, lines = latent_norm(run, config, step=step)
        facts |= {"scaling_factor": norm.scaling_factor, "shift_factor": norm.shift_factor}
    metadata = {"format": "pt", "likelihood": config.likelihood.kind}
    metadata |= {name: json.dumps(value) for name, value in facts.items()}
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / PLAIN_NAME, safetensors.torch.save(tensors, metadata))
    return lines


def latent_norm(run: Path, config: TrainConfig, *, step: int) -> tuple[LatentNorm, list[str]]:
    """How latents of this run are normalised, and where that is from: not at all where nothing was
    measured."""
    with contextlib.suppress(ConfigError):
        if (published := _published_origin(config)) is not None:
            return published.norm, [f"latents are normalised as those of {published.path}"]
    path = run / STATISTICS_FILE
    try:
        record = read_json(path, STATISTICS_BYTES)
        scale, shift = (float(record[name]) for name in ("scaling_factor", "shift_factor"))
        channels = record.get("per_channel", {})
        mean, std = (tuple(map(float, channels.get(name, ()))) for name in ("mean", "std"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return LatentNorm(), [f"scaling_factor 1, shift_factor 0: {path} cannot be read ({error})"]
    lines = [f"scaling_factor {scale:.5g}, shift_factor {shift:.5g}, from {path}"]
    if (measured := record.get("step", step)) != step:
        lines.append(f"warning: measured at step {measured}, the weights are of {step}")
    return LatentNorm(scale, shift, mean, std), lines


def _published_origin(config: TrainConfig) -> Published | None:
    """Whose latents decoders that were trained alone, one after the other, left as they are. Raises
    ConfigError."""
    for _ in range(MAX_STAGES):
        if config.training.train_only != "decoder":
            return None
        source = local_source(config.init_from)
        if (published := read_published(source)) is not None:
            return published
        config = RunFolder(named_checkpoint(source)[0].parent).config()
    return None
