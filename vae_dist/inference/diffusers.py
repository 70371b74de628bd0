"""A trained model as files for other programs.

In: a loaded model and its run folder. Out: a folder with

    diffusers     config.json, diffusion_pytorch_model.safetensors, README.md:
                  loads with `diffusers.AutoencoderKL.from_pretrained(FOLDER)`
    safetensors   model.safetensors: all tensors under our names; metadata with config, step,
                  likelihood, image size

and what there is to say about it. Images are in [-1, 1] on both sides. Latents for a diffusion
model are (z - shift_factor) * scaling_factor, with the factors of the run's `latents.json`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.files import printable, read_json, write_durably
from vae_dist.inference.load import LoadedModel
from vae_dist.models.diffusers import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    diffusers_config,
    export_problems,
    to_diffusers,
)
from vae_dist.models.latent import STATISTICS_FILE

PLAIN_NAME = "model.safetensors"
CARD_NAME = "README.md"
STATISTICS_BYTES = 2**20
CARD = """---
library_name: diffusers
tags: [autoencoder, vae]
---

An `AutoencoderKL` trained with vae_dist, config `{name}`, step {step}, on images of
{height}x{width} pixels; stride {stride}, {latents} latent channels, {likelihood} likelihood. Images
are in [-1, 1], their sides multiples of {stride}; latents for a diffusion model are
`(z - {shift_factor}) * {scaling_factor}`.

```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained(FOLDER)
```
"""


def export_diffusers(loaded: LoadedModel, run: Path, out: Path) -> list[str]:
    """Write the folder of an AutoencoderKL; what was cut, and which factors it has. Raises
    ConfigError with everything that the format has no place for, or where something else is in the
    folder; OSError."""
    model, config, step, (height, width) = loaded
    if problems := export_problems(config):
        raise ConfigError(
            [
                "format=diffusers: AutoencoderKL has no place for parts of this model:",
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
    factors, lines = latent_factors(run, step=step)
    card = CARD.format(
        name=_name(config),
        step=step,
        height=height,
        width=width,
        stride=model.stride,
        latents=model.latent_channels,
        likelihood=config.likelihood.kind,
        **factors,
    )
    settings = diffusers_config(config, loaded.image_size, **factors)
    tensors = to_diffusers(model.state_dict(), channels=config.data.channels)
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
        factors, lines = latent_factors(run, step=step)
    facts = {"config": _model_config(config), "step": step, "image_size": image_size, **factors}
    metadata = {"format": "pt", "likelihood": config.likelihood.kind}
    metadata |= {name: json.dumps(value) for name, value in facts.items()}
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / PLAIN_NAME, safetensors.torch.save(tensors, metadata))
    return lines


def latent_factors(run: Path, *, step: int) -> tuple[dict[str, float], list[str]]:
    """scaling_factor and shift_factor of the run's latents, 1 and 0 where they were not measured,
    and what there is to say about that."""
    path = run / STATISTICS_FILE
    try:
        record = read_json(path, STATISTICS_BYTES)
        scale, shift = (float(record[name]) for name in ("scaling_factor", "shift_factor"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "is not there (not measured yet)" if missing else f"cannot be read ({error!r})"
        scale, shift = 1.0, 0.0
        lines = [f"scaling_factor 1, shift_factor 0: {path} {reason}"]
    else:
        lines = [f"scaling_factor {scale:.5g}, shift_factor {shift:.5g}, from {path}"]
        if (measured := record.get("step", step)) != step:
            of = f"measured at step {measured}, the weights are of {step}"
            lines.append(f"warning: {path} was {of}")
    return {"scaling_factor": scale, "shift_factor": shift}, lines


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
