"""The layout of diffusers' `AutoencoderKL`: which models have it, and the ways to it and from it.
`AutoencoderKLFlux2` has the same towers, and beside them `bn`, the mean and variance of latents.

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

What a diffusion model gets is normalised outside of the model, by these, in this order of time:

    scalar    (z - shift_factor) * scaling_factor                  SD, SD3, FLUX.1
    channel   (z - latents_mean) / latents_std * scaling_factor    SDXL; the factor is 1
    flux2     (p - bn.running_mean) / sqrt(bn.running_var + eps), p = z in blocks of 2x2 positions:
              channel 4 c + 2 dy + dx of p is channel c of z
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown, value_of
from vae_dist.config.schema import TrainConfig
from vae_dist.models.build import blocks_of_levels

Tensors = dict[str, torch.Tensor]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
WEIGHTS_NAMES = (WEIGHTS_NAME, "diffusion_pytorch_model.fp16.safetensors")

AUTOENCODER, FLUX2 = "AutoencoderKL", "AutoencoderKLFlux2"
BN_EPS = 1e-4  # diffusers' default for FLUX.2
SCALING_FACTOR = 0.18215  # diffusers' default; sd-vae-ft-mse and others of its age do not say it
PACKED = 4  # positions of a block of 2x2

# Likelihoods whose first decoder outputs are the mean of the image.
KINDS_OF_MEANS = ("gaussian", "laplace", "discretized_gaussian")

# What a config of ours has where a model is an AutoencoderKL.
FIXED = {
    "data.mask": "none",
    "model.arch": "conv",
    "model.latent": "spatial",
    "model.patch": 1,
    "model.dc_shortcuts": False,
    "model.num_classes": 0,
}

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# ours -> diffusers


def export_problems(config: TrainConfig) -> list[str]:
    """What of this config has no place in an AutoencoderKL, a sentence each; empty: nothing."""
    problems = [
        f"{key}={shown(value_of(config, key))}: the format is that of {key}={shown(value)}"
        for key, value in FIXED.items()
        if value_of(config, key) != value
    ]
    if len(set(blocks_of_levels(config.model))) > 1:
        problems.append(f"model.blocks={config.model.blocks}: the format has as many in each level")
    if config.likelihood.kind not in KINDS_OF_MEANS:
        problems.append(
            f"likelihood.kind={config.likelihood.kind}: its decoder outputs are not an image; "
            f"{', '.join(KINDS_OF_MEANS)} have one"
        )
    return problems


@dataclass(frozen=True)
class LatentNorm:
    """How latents are normalised: by one pair of factors, or by mean and deviation of channels."""

    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    mean: tuple[float, ...] = ()  # of each channel; empty: not known
    std: tuple[float, ...] = ()
    blocks: tuple[tuple[float, ...], ...] = ()  # FLUX.2's own mean and variance, where published

    def settings(self, normalization: Literal["channel", "scalar"]) -> dict[str, Any]:
        """The keys of an AutoencoderKL's `config.json`."""
        values: tuple[Any, ...] = (1.0, 0.0, list(self.mean), list(self.std))
        if normalization == "scalar" or not self.mean:
            values = (self.scaling_factor, self.shift_factor, None, None)
        keys = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
        return dict(zip(keys, values, strict=True))

    def packed(self, latent_channels: int) -> Tensors:
        """The tensors of FLUX.2's `bn`: as published, else the same for the positions of a
        block."""
        if self.blocks:
            mean, variance = torch.tensor(self.blocks, dtype=torch.float64)
        else:
            mean = torch.tensor(self.mean or (0.0,) * latent_channels).repeat_interleave(PACKED)
            std = torch.tensor(self.std or (1.0,) * latent_channels)
            variance = std.square().repeat_interleave(PACKED)
        return {
            "bn.running_mean": mean.float(),
            "bn.running_var": (variance - BN_EPS).clamp(min=0).float(),
            "bn.num_batches_tracked": torch.tensor(0),
        }


def diffusers_config(
    config: TrainConfig, image_size: tuple[int, int], *, kind: str = AUTOENCODER
) -> dict[str, Any]:
    """`config.json` of a model without `export_problems`, but for the normalisation."""
    model, levels = config.model, len(config.model.channels)
    settings = {
        "_class_name": kind,
        "act_fn": "silu",
        "block_out_channels": list(model.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.data.channels,
        "latent_channels": model.latent_channels,
        "layers_per_block": blocks_of_levels(model)[0],  # the same in all
        "mid_block_add_attention": model.attention,
        "norm_num_groups": model.norm_groups,
        "out_channels": config.data.channels,
        "sample_size": max(image_size),
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    }
    if kind == FLUX2:
        return settings | {"batch_norm_eps": BN_EPS, "patch_size": [2, 2]}
    return settings | {"force_upcast": True}


def to_diffusers(weights: Tensors, *, channels: int) -> Tensors:
    """The tensors of an AutoencoderKL of images of `channels` channels: decoder outputs other than
    the mean are cut off; parameters of the likelihood and of the alignment are left out."""
    return {
        name: (tensor[:channels] if name.startswith("decoder.conv_out.") else tensor).contiguous()
        for name, tensor in weights.items()
        if not name.startswith(("likelihood.", "projection."))
    }


# diffusers -> ours


class Published(NamedTuple):
    """A diffusers folder: what its config.json says, and its tensors by current names, float32."""

    path: Path
    config: dict[str, Any]
    tensors: Tensors
    norm: LatentNorm


def local_source(address: str) -> Path:
    """The folder of `hf://OWNER/NAME[/SUBFOLDER]` in the Hub's cache, after what it lacks is
    downloaded; any other address is a path. Raises ConfigError."""
    if not address.startswith("hf://"):
        return Path(address).expanduser()
    from huggingface_hub import snapshot_download

    owner, name, below = [*address.removeprefix("hf://").split("/", 2), "", ""][:3]
    folders = [f"{below.strip('/')}/"] if below else ["", "vae/"]
    files = [folder + file for folder in folders for file in (CONFIG_NAME, *WEIGHTS_NAMES)]
    try:
        with contextlib.suppress(FileNotFoundError):  # nothing of it is in the cache
            folder = Path(snapshot_download(f"{owner}/{name}", local_files_only=True))
            if any((folder / file).is_file() for file in files if file.endswith(WEIGHTS_NAMES)):
                return folder / below
        return Path(snapshot_download(f"{owner}/{name}", allow_patterns=files)) / below
    except Exception as error:  # its transport, and so what it raises, differs by version
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{address}: cannot be read from the Hugging Face Hub ({reason}); give "
            "hf://OWNER/NAME[/SUBFOLDER], or a folder"
        ) from None


def read_published(source: Path) -> Published | None:
    """The AutoencoderKL in a folder, in the vae/ of a pipeline's folder, or of a file in one; None
    where there is no sign of diffusers. Raises ConfigError, blaming `init_from`."""
    blame = f"init_from={source}"
    folder = source.parent if source.suffix == ".safetensors" else source
    if source == folder and not (folder / CONFIG_NAME).is_file():
        folder = folder / "vae"
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{blame}: {folder / CONFIG_NAME} cannot be read ({error})") from None
    if not isinstance(config, dict) or "_class_name" not in config:
        return None
    if problems := _foreign(config):
        raise ConfigError([f"{blame}: {problem}" for problem in problems])
    names = (source.name,) if source.suffix == ".safetensors" else WEIGHTS_NAMES
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise ConfigError(
            f"{blame}: {folder} has no {names[0]}; other weights than safetensors are not read, "
            "write them with diffusers' save_pretrained(FOLDER)"
        )
    try:
        tensors = safetensors.torch.load(file.read_bytes())
        norm = _norm(config, tensors)
    except Exception as error:  # of the file, or of numbers in a forged config
        raise ConfigError(f"{blame}: {file} cannot be read ({error})") from None
    tensors = {name: value for name, value in tensors.items() if not name.startswith("bn.")}
    return Published(folder, config, _by_current_names(tensors), norm)


def _norm(config: dict[str, Any], tensors: Tensors) -> LatentNorm:
    """Of FLUX.2's blocks also the mean over positions of their moments."""
    if "bn.running_mean" in tensors:
        mean = tensors["bn.running_mean"].double().view(-1, PACKED)
        variance = tensors["bn.running_var"].double().view(-1, PACKED)
        variance = variance + config.get("batch_norm_eps", BN_EPS)
        spread = (mean - mean.mean(1, keepdim=True)).square() + variance
        blocks = tuple(mean.flatten().tolist()), tuple(variance.flatten().tolist())
        means, std = (tuple(part.tolist()) for part in (mean.mean(1), spread.mean(1).sqrt()))
        return LatentNorm(mean=means, std=std, blocks=blocks)
    factor = float(config.get("scaling_factor", SCALING_FACTOR) or 1.0)
    return LatentNorm(
        scaling_factor=factor,
        shift_factor=config.get("shift_factor") or 0.0,
        mean=tuple(config.get("latents_mean") or ()),
        std=tuple(std / factor for std in config.get("latents_std") or ()),  # then it is 1
    )


def _foreign(config: dict[str, Any]) -> list[str]:
    """What of a config.json our towers do not do."""
    kind = config["_class_name"]
    if kind not in (AUTOENCODER, FLUX2):
        return [f"a diffusers {kind}; only {AUTOENCODER} and {FLUX2} have towers as ours"]
    widths = config.get("block_out_channels", [64])
    known = {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "decoder_block_out_channels": widths,
    }
    return [
        f"its {key}={config[key]}, and our towers have {value}"
        for key, value in known.items()
        if config.get(key) not in (None, value)
    ]


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
    return FIXED | {
        "data.channels": config.get("in_channels", 3),
        "model.latent_channels": config.get("latent_channels", 4),
        "model.channels": list(config.get("block_out_channels", [64])),
        "model.blocks": config.get("layers_per_block", 1),
        "model.attention": config.get("mid_block_add_attention", True),
        "model.norm_groups": config.get("norm_num_groups", 32),
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
