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
from vae_dist.files import write_durably
from vae_dist.inference.load import LoadedModel
from vae_dist.models.diffusers import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Tensors,
    diffusers_config,
    export_problems,
    to_diffusers,
)

STATISTICS_NAME = "latents.json"
PLAIN_NAME = "model.safetensors"
CARD_NAME = "README.md"
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
    ConfigError with everything that the format has no place for, OSError."""
    config = loaded.config
    if problems := export_problems(config):
        raise ConfigError(
            [
                "format=diffusers: AutoencoderKL has no place for parts of this model:",
                *(f"  {problem}" for problem in problems),
                "format=safetensors writes any model",
            ]
        )
    _check_free(out)
    factors, words = latent_factors(run, step=loaded.step)
    tensors = to_diffusers(_weights(loaded), channels=config.data.channels)
    settings = diffusers_config(config, loaded.image_size, **factors)
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / WEIGHTS_NAME, safetensors.torch.save(tensors, {"format": "pt"}))
    write_durably(out / CONFIG_NAME, _json(settings))
    write_durably(out / CARD_NAME, _card(loaded, factors).encode())
    return [*_cuts(loaded), *words]


def export_safetensors(loaded: LoadedModel, run: Path, out: Path) -> list[str]:
    """Write one file with all tensors and what is known of them; words about it. Raises OSError."""
    factors, words = latent_factors(run, step=loaded.step)
    height, width = loaded.image_size
    facts = {
        "config": _model_config(loaded.config),
        "step": loaded.step,
        "likelihood": loaded.config.likelihood.kind,
        "image_size": [height, width],
        **factors,
    }
    metadata = {"format": "pt"}
    metadata |= {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in facts.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / PLAIN_NAME, safetensors.torch.save(_weights(loaded), metadata))
    return words


def _check_free(out: Path) -> None:
    """An export may be written again, but not over a README.md or config.json of something else.
    Raises ConfigError."""
    used = [name for name in (CARD_NAME, CONFIG_NAME) if (out / name).exists()]
    if used and not (out / WEIGHTS_NAME).exists():
        raise ConfigError(
            f"out={out}: holds {' and '.join(used)}, but no {WEIGHTS_NAME} of an export; give "
            "another folder"
        )


def latent_factors(run: Path, *, step: int) -> tuple[dict[str, float], list[str]]:
    """scaling_factor and shift_factor of the run's latents, 1 and 0 where nobody measured them, and
    what there is to say about that."""
    path = run / STATISTICS_NAME
    factors = {"scaling_factor": 1.0, "shift_factor": 0.0}
    try:
        record = json.loads(path.read_bytes())
        factors = {name: float(record[name]) for name in factors}
    except FileNotFoundError:
        return factors, [
            f"scaling_factor 1, shift_factor 0: {path} is not there (not measured yet)"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return factors, [f"scaling_factor 1, shift_factor 0: {path} cannot be read ({error!r})"]
    words = [
        f"scaling_factor {factors['scaling_factor']:.5g}, shift_factor "
        f"{factors['shift_factor']:.5g}, from {path}"
    ]
    measured = record.get("step", step)
    if measured != step:
        words.append(f"warning: {path} was measured at step {measured}, the weights are of {step}")
    return factors, words


def _weights(loaded: LoadedModel) -> Tensors:
    return {name: value.contiguous() for name, value in loaded.model.state_dict().items()}


def _cuts(loaded: LoadedModel) -> Iterator[str]:
    """What the format loses of this model, in words."""
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
    """What a program needs to build the model; no paths, which are nobody's business."""
    data = dataclasses.asdict(config.data)
    kept = ("channels", "bits", "resolution", "dequantize", "mask")
    return {
        "name": Path(config.config).stem,
        "seed": config.seed,
        "data": {key: data[key] for key in kept},
        "model": dataclasses.asdict(config.model),
        "likelihood": dataclasses.asdict(config.likelihood),
        "objective": dataclasses.asdict(config.objective),
    }


def _card(loaded: LoadedModel, factors: dict[str, float]) -> str:
    height, width = loaded.image_size
    return CARD.format(
        name=Path(loaded.config.config).stem,
        step=loaded.step,
        height=height,
        width=width,
        stride=loaded.model.stride,
        latents=loaded.model.latent_channels,
        likelihood=loaded.config.likelihood.kind,
        **factors,
    )


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
