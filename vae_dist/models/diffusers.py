"""The layout of diffusers' `AutoencoderKL`: which models have it, and the ways to it and from it.

In: a config, or a folder with `config.json` and `diffusion_pytorch_model.safetensors`. Out: what
keeps a model from that layout, its `config.json`, its tensors; or a folder's tensors under our
names, and the keys of a config that fit it.

Our spatial towers carry diffusers' names, eps of GroupNorm (1e-6) and padding of strided
convolutions (right and bottom). What differs:

    likelihood        diffusers has none: its decoder gives the mean; other decoder outputs are cut
    log-variance      clamped to [-30, 20]; ours approaches these bounds smoothly, the same to 1e-4
                      in [-20, 10]
    quant_conv        absent in some layouts (FLUX): the identity here
    attention         older files name query, key, value, proj_attn, some as 1x1 convolutions
    sizes             diffusers wants multiples of the stride; ours pads and crops
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.models.build import blocks_of_levels

Tensors = dict[str, torch.Tensor]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
WEIGHTS_NAMES = (WEIGHTS_NAME, "diffusion_pytorch_model.fp16.safetensors")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")

# Likelihoods whose first decoder outputs are the mean of the image.
KINDS_OF_MEANS = ("gaussian", "laplace", "discretized_gaussian")

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# ours -> diffusers


def export_problems(config: TrainConfig) -> list[str]:
    """What of this config has no place in an AutoencoderKL, a sentence each; empty: nothing."""
    model, likelihood, mask = config.model, config.likelihood.kind, config.data.mask
    uneven = isinstance(model.blocks, list) and len(set(model.blocks)) > 1
    checks = {
        f"model.latent={model.latent}: the format has spatial latents": model.latent != "spatial",
        f"model.patch={model.patch}: the format begins with single pixels": model.patch != 1,
        "model.dc_shortcuts=true: the format has no space-to-channel shortcuts": model.dc_shortcuts,
        f"model.num_classes={model.num_classes}: the format knows no labels": model.num_classes > 0,
        f"model.blocks={model.blocks}: the format has equally many in each level": uneven,
        f"data.mask={mask}: the format's encoder sees no mask": mask != "none",
        f"likelihood.kind={likelihood}: its decoder outputs are not an image; "
        f"{', '.join(KINDS_OF_MEANS)} have one": likelihood not in KINDS_OF_MEANS,
    }
    return [sentence for sentence, is_so in checks.items() if is_so]


def diffusers_config(
    config: TrainConfig, image_size: tuple[int, int], **factors: float
) -> dict[str, Any]:
    """`config.json` of a model without `export_problems`; factors: scaling_factor, shift_factor."""
    model, levels = config.model, len(config.model.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(model.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": config.data.channels,
        "latent_channels": model.latent_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": blocks_of_levels(model)[0],  # the same in all
        "mid_block_add_attention": model.attention,
        "norm_num_groups": model.norm_groups,
        "out_channels": config.data.channels,
        "sample_size": max(image_size),
        "scaling_factor": factors["scaling_factor"],
        "shift_factor": factors["shift_factor"],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    }


def to_diffusers(weights: Tensors, *, channels: int) -> Tensors:
    """The tensors of an AutoencoderKL of images of `channels` channels: decoder outputs other than
    the mean are cut off, parameters of the likelihood left out."""
    return {
        name: (tensor[:channels] if name.startswith("decoder.conv_out.") else tensor).contiguous()
        for name, tensor in weights.items()
        if not name.startswith("likelihood.")
    }


# diffusers -> ours


class Published(NamedTuple):
    """A diffusers folder: what its config.json says, and its tensors by current names, float32."""

    path: Path
    config: dict[str, Any]
    tensors: Tensors


def read_published(source: Path) -> Published | None:
    """The AutoencoderKL in a folder, in the vae/ of a pipeline's folder, or of a file in one; None
    where there is no sign of diffusers. Raises ConfigError, blaming `init_from`."""
    blame = f"init_from={source}"
    if source.suffix in PICKLES:
        raise ConfigError(f"{blame}: {_no_pickles(source.name)}")
    folder = source.parent if source.suffix == ".safetensors" else source
    if source == folder and not (folder / CONFIG_NAME).is_file():
        folder = folder / "vae"
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{blame}: {folder / CONFIG_NAME} cannot be read ({error})") from None
    if not isinstance(config, dict) or "_class_name" not in config:
        return None
    if problems := _foreign(config):
        raise ConfigError([f"{blame}: {problem}" for problem in problems])
    file = source if source.suffix == ".safetensors" else _weights_file(folder, blame)
    try:
        tensors = safetensors.torch.load(file.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{blame}: {file} cannot be read ({error})") from None
    return Published(folder, config, _by_current_names(tensors))


def _foreign(config: dict[str, Any]) -> list[str]:
    """What of a config.json our towers do not do."""
    kind = config["_class_name"]
    if kind != "AutoencoderKL":
        return [f"a diffusers {kind}; only AutoencoderKL has towers as ours"]
    wanted = {
        "act_fn": "silu",
        "down_block_types": "DownEncoderBlock2D",
        "up_block_types": "UpDecoderBlock2D",
    }
    problems = []
    for key, known in wanted.items():
        value = config.get(key, [])
        others = {str(item) for item in (value if isinstance(value, list) else [value])} - {known}
        if others:
            problems.append(f"its {key} has {', '.join(sorted(others))}, which our towers lack")
    return problems


def _weights_file(folder: Path, blame: str) -> Path:
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ConfigError(f"{blame}: {_no_pickles(pickles[0])}")
    raise ConfigError(f"{blame}: {folder} has no {WEIGHTS_NAME}")


def _no_pickles(name: str) -> str:
    return (
        f"{name} is a pickle, which can run code when it is loaded, so it is not read; write it "
        "as safetensors where you trust it, with diffusers' save_pretrained(FOLDER)"
    )


def _by_current_names(tensors: Tensors) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*attentions\.\d+)\.(.*)\.(weight|bias)", name)
        if match:
            place, layer, kind = match.groups()
            name = f"{place}.{OLD_ATTENTION.get(layer, layer)}.{kind}"
            if tensor.ndim == 4:  # a 1x1 convolution
                tensor = tensor[:, :, 0, 0]
        renamed[name] = tensor.float().contiguous()
    return renamed


def fitting_keys(published: Published) -> dict[str, Any]:
    """The keys of a config whose model has the folder's weights, with their values."""
    config = published.config
    return {
        "data.channels": config.get("in_channels", 3),
        "data.mask": "none",
        "model.arch": "conv",
        "model.latent": "spatial",
        "model.latent_channels": config.get("latent_channels", 4),
        "model.channels": list(config.get("block_out_channels", [64])),
        "model.patch": 1,
        "model.blocks": config.get("layers_per_block", 1),
        "model.dc_shortcuts": False,
        "model.attention": config.get("mid_block_add_attention", True),
        "model.norm_groups": config.get("norm_num_groups", 32),
        "model.num_classes": 0,
    }


def from_diffusers(published: Published, fresh: Tensors) -> Tensors:
    """Weights for our model. `fresh` holds what the format lacks (parameters of the likelihood)
    and the decoder's last layer, whose rows beyond the mean stay as they are there."""
    tensors = dict(published.tensors)
    latents = published.config.get("latent_channels", 4)
    for name, size in (("quant_conv", 2 * latents), ("post_quant_conv", latents)):
        if f"{name}.weight" not in tensors:
            tensors[f"{name}.weight"] = torch.eye(size)[:, :, None, None]
            tensors[f"{name}.bias"] = torch.zeros(size)
    for name, value in fresh.items():
        given = tensors.get(name)
        if given is None:
            tensors[name] = value
        elif given.shape[1:] == value.shape[1:] and len(given) < len(value):
            tensors[name] = torch.cat([given, value[len(given) :]])
    return tensors
