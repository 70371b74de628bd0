"""A trained model as files for other programs.

In: a loaded model and its run folder. Out: a folder with

    diffusers     config.json, diffusion_pytorch_model.safetensors, README.md:
                  loads with `diffusers.AutoencoderKL.from_pretrained(FOLDER)`
    flux2         the same for `diffusers.AutoencoderKLFlux2`
    safetensors   model.safetensors: all tensors under our names; metadata with config, step,
                  likelihood, image size

and what there is to say about it. Images are in [-1, 1] on both sides. How a diffusion model
normalises latents is said in `vae_dist.models.diffusers`; the numbers are those of the run's
`latents.json`, or of the published autoencoder whose decoder alone was trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import safetensors.torch

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.files import printable, read_json, write_durably
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
from vae_dist.run.folder import RunFolder

PLAIN_NAME = "model.safetensors"
CARD_NAME = "README.md"
STATISTICS_BYTES = 2**20
MAX_STAGES = 16  # runs that begin from one another
CARD = """---
library_name: diffusers
tags: [autoencoder, vae]
---

An `{kind}` trained with vae_dist, config `{name}`, step {step}, on images of
{height}x{width} pixels; stride {stride}, {latents} latent channels, {likelihood} likelihood. Images
are in [-1, 1], their sides multiples of {stride}; latents for a diffusion model are
{formula}.

```python
from diffusers import {kind}

vae = {kind}.from_pretrained(FOLDER)
```
"""


FORMULAS = {
    "scalar": "`(z - shift_factor) * scaling_factor`",
    "channel": "`(z - latents_mean) / latents_std`, for each channel",
    FLUX2: "`(z - mean) / sqrt(variance + batch_norm_eps)`, of blocks of 2x2 positions",
}


def export_diffusers(
    loaded: LoadedModel,
    run: Path,
    out: Path,
    *,
    kind: str = AUTOENCODER,
    normalization: Literal["channel", "scalar"] = "channel",
) -> list[str]:
    """Write the folder of an AutoencoderKL or AutoencoderKLFlux2; what was cut, and how latents are
    normalised. Raises ConfigError with everything that the format has no place for, or where
    something else is in the folder; OSError."""
    model, config, step, (height, width) = loaded
    if problems := export_problems(config):
        raise ConfigError(
            [
                f"format: diffusers' {kind} has no place for parts of this model:",
                *(f"  {problem}" for problem in problems),
                "format=safetensors writes any model",
            ]
        )
    used = [name for name in (CARD_NAME, CONFIG_NAME) if (out / name).exists()]
    if used and not (out / WEIGHTS_NAME).exists():
        raise ConfigError(
            f"out={out}: holds {' and '.join(used)}, but no {WEIGHTS_NAME} of an export; give "
            "another folder"
        )
    norm, lines = latent_norm(run, config, step=step)
    settings = diffusers_config(config, loaded.image_size, kind=kind)
    tensors = to_diffusers(model.state_dict(), channels=config.data.channels)
    if kind == FLUX2:
        tensors |= norm.packed(model.latent_channels)
    else:
        settings |= norm.settings(normalization)
    way = normalization if norm.mean else "scalar"
    card = CARD.format(
        kind=kind,
        name=_name(config),
        step=step,
        height=height,
        width=width,
        stride=model.stride,
        latents=model.latent_channels,
        likelihood=config.likelihood.kind,
        formula=FORMULAS[FLUX2 if kind == FLUX2 else way],
    )
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / WEIGHTS_NAME, safetensors.torch.save(tensors, {"format": "pt"}))
    write_durably(out / CONFIG_NAME, (json.dumps(settings, indent=2) + "\n").encode())
    write_durably(out / CARD_NAME, card.encode())
    return [*_cuts(loaded), *lines]


def export_safetensors(loaded: LoadedModel, run: Path, out: Path) -> list[str]:
    """Write one file with all tensors and what is known of them; what there is to say. Raises
    OSError."""
    model, config, step, image_size = loaded
    factors, lines = dict[str, float](), list[str]()
    if model.image_size is None:  # of a vector latent nothing is measured
        norm, lines = latent_norm(run, config, step=step)
        factors = {"scaling_factor": norm.scaling_factor, "shift_factor": norm.shift_factor}
    facts = {"config": _model_config(config), "step": step, "image_size": image_size, **factors}
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
        missing = isinstance(error, FileNotFoundError)
        reason = "is not there (not measured yet)" if missing else f"cannot be read ({error!r})"
        return LatentNorm(), [f"scaling_factor 1, shift_factor 0: {path} {reason}"]
    lines = [f"scaling_factor {scale:.5g}, shift_factor {shift:.5g}, from {path}"]
    if (measured := record.get("step", step)) != step:
        of = f"measured at step {measured}, the weights are of {step}"
        lines.append(f"warning: {path} was {of}")
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
        is_step = source.name.startswith("step_")
        config = RunFolder(source.parent.parent if is_step else source).config()
    return None


def _cuts(loaded: LoadedModel) -> Iterator[str]:
    """What the format loses of this model, a line each."""
    likelihood, channels = loaded.config.likelihood, loaded.config.data.channels
    names = [name for name in loaded.model.state_dict() if name.startswith("likelihood.")]
    if names:
        yield f"left out: {', '.join(names)} ({likelihood.kind}, {likelihood.variance} variance)"
    extra = loaded.model.likelihood.num_params(channels) - channels
    if extra:
        yield (
            f"cut off: {extra} of {channels + extra} decoder outputs (log-variances of the "
            f"{likelihood.kind} likelihood); the mean stays"
        )
    if likelihood.kind == "discretized_gaussian":
        yield "the decoder gives the mean of the normal variable, before it is cut into levels"


def _model_config(config: TrainConfig) -> dict[str, Any]:
    """What a program needs to build the model; no paths."""
    data = dataclasses.asdict(config.data)
    kept = ("channels", "bits", "resolution", "dequantize", "mask")
    sections = ("model", "likelihood", "objective")
    return {
        "name": _name(config),
        "seed": config.seed,
        "data": {key: data[key] for key in kept},
        **{name: dataclasses.asdict(getattr(config, name)) for name in sections},
    }


def _name(config: TrainConfig) -> str:
    return printable(Path(config.config).stem)
