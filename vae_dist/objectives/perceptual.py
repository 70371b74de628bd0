"""The perceptual term: how far reconstructions look from images, in nats.

    term = weight * C*H*W * d(reconstruction, image)         d: structure, or LPIPS

so that `weight` is nats of each value for a distance of 1, whatever the size of the image: the
distortion of a likelihood with learned sigma is about half a nat (gaussian) or one (laplace) of
each value too, wherever sigma stands.

The distance is computed in float32 outside autocast: both kinds subtract features of two pictures
that are nearly equal, and bfloat16 would leave eight bits of what is compared. On CUDA, cuDNN may
round the inputs of LPIPS' convolutions to TF32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vae_dist.config.schema import PerceptualConfig
from vae_dist.models.perceptual import FILES, SMALLEST_SIDE, Backbone, Lpips, load_lpips
from vae_dist.models.pretrained import fetch
from vae_dist.models.structure import WINDOW, StructureDistance

BACKBONES: dict[str, Backbone] = {"lpips": "vgg", "lpips_alex": "alex"}


class PerceptualTerm:
    """Callable: `(reconstructions, images) -> distances (B,)`, both (B, C, H, W) in [-1, 1]."""

    def __init__(self, config: PerceptualConfig, distance: nn.Module) -> None:
        self.weight = config.weight
        # SSIM subtracts means of squares that nearly cancel: TF32 would round them by more than is
        # left where a picture is bright and flat
        self.needs_exact_float32 = isinstance(distance, StructureDistance)
        self._distance = distance.requires_grad_(False).eval()

    def __call__(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        if not isinstance(self._distance, StructureDistance) and images.shape[1] == 1:
            images, reconstructions = (x.expand(-1, 3, -1, -1) for x in (images, reconstructions))
        distances: Tensor = self._distance(reconstructions.float(), images.float())
        return distances


def folder_of(config: PerceptualConfig) -> Path | None:
    return Path(config.weights) if config.weights else None


def fetch_weights(config: PerceptualConfig) -> None:
    """Have the weight files on this machine, downloaded if need be; for one process only.

    Raises ConfigError that says what to put where.
    """
    if config.kind in BACKBONES:
        fetch(FILES[BACKBONES[config.kind]], folder_of(config))


def build_perceptual(config: PerceptualConfig, device: torch.device) -> PerceptualTerm | None:
    """None for kind=none. `fetch_weights` comes first. Raises ConfigError."""
    if config.kind == "none":
        return None
    assert config.kind != "auto", "it is resolved when a run begins"
    distance: nn.Module = StructureDistance()
    if config.kind in BACKBONES:
        backbone = BACKBONES[config.kind]
        distance = load_lpips(backbone, fetch(FILES[backbone], folder_of(config)))
    return PerceptualTerm(config, distance.to(device))


def distance_of(kind: str) -> nn.Module | None:
    """The module of a kind, LPIPS on the meta device, without weights; None for none."""
    if kind in BACKBONES:
        with torch.device("meta"):
            return Lpips(BACKBONES[kind])
    return StructureDistance() if kind == "structure" else None


def smallest_side(config: PerceptualConfig) -> int:
    """Pixels of the shorter side of the smallest image that the term takes."""
    if config.kind == "none":
        return 1
    return SMALLEST_SIDE[BACKBONES[config.kind]] if config.kind in BACKBONES else WINDOW
