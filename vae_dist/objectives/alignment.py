"""Alignment of the latent with a frozen vision model (Yao and Wang 2025, VA-VAE).

    term(image) = mean_i relu(1 - m1 - cos(p_i, f_i))
                + mean_ij relu(|cos(p_i, p_j) - cos(f_i, f_j)| - m2)

p = the latent z at h x w positions, projected to the width of the model by a 1x1 convolution that
is trained along; f = features of the image's patches, resampled to the same positions; m1 and m2
are margins. The loss gains

    w(k) * D * term      w(k) = weight(k) * lambda(k)    lambda(k + 1) = |G_main(k)| / |G_align(k)|

per image of D values, with weight(k) falling linearly from `alignment_weight` to
`alignment_final_weight` over the run. G_main and G_align are gradients with respect to z, of
distortion and perceptual term and of D * term, over all images of step k and all ranks; the ratio
is used from the next step on, so that microbatches and ranks do not change it.

The model comes from `transformers` (extra `alignment`): DINOv2, DINOv3 and others whose last hidden
state ends with the patches. It stays float32 and is not trained, saved or exported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.config.errors import ConfigError

KEY = "objective.alignment"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def alignment_distance(
    projected: Tensor, features: Tensor, *, cosine_margin: float, distance_margin: float
) -> Tensor:
    """The two terms of each image, (b,) float32: of projected (b, W, h, w) and features
    (b, W, h', w'), which are resampled to h x w."""
    features = F.interpolate(
        features.float(), projected.shape[-2:], mode="bilinear", align_corners=False, antialias=True
    )
    p = F.normalize(projected.float().flatten(2), dim=1)  # (b, W, h w)
    f = F.normalize(features.flatten(2), dim=1)
    cosine = F.relu(1 - cosine_margin - (p * f).sum(1)).mean(1)
    difference = (p.mT @ p - f.mT @ f).abs()
    return cosine + F.relu(difference - distance_margin).mean((1, 2))


class VisionFeatures(nn.Module):
    """Callable: `images (b, C, H, W) in [-1, 1], C = 1 or 3 -> features (b, W, h', w')`.

    Sides go to the nearest multiple of the model's patches; one position is one patch.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        config: Any = model.config
        self.patch, self.width = int(config.patch_size), int(config.hidden_size)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        rows, columns = (max(1, round(side / self.patch)) for side in (height, width))
        return rows, columns

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        rows, columns = self.grid(*images.shape[-2:])
        size = rows * self.patch, columns * self.patch
        images = images.float().expand(-1, 3, -1, -1)
        if images.shape[-2:] != size:
            images = F.interpolate(
                images, size, mode="bicubic", align_corners=False, antialias=True
            ).clamp(-1, 1)
        pixels = ((images + 1) / 2 - self.mean) / self.std
        tokens: Tensor = self.model(pixel_values=pixels).last_hidden_state  # (b, n, W)
        return tokens[:, -rows * columns :].mT.unflatten(2, (rows, columns))


def _from_transformers(kind: str, name: str, **options: Any) -> Any:
    """`kind.from_pretrained(name)`. Raises ConfigError."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(f"{KEY} needs transformers: pip install 'vae_dist[alignment]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, kind).from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:  # not found, not a model, no network
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{KEY}={name}: no vision model can be loaded from there ({first}); give a folder of "
            "save_pretrained, or a name on the Hugging Face Hub"
        ) from None


def feature_width(name: str) -> int:
    """Values of a patch's features of the model in a local folder or of that name on the hub.

    Raises ConfigError where there is none, or its features are not those of patches.
    """
    config = _from_transformers("AutoConfig", name)
    config = getattr(config, "vision_config", config)
    width, patch = getattr(config, "hidden_size", None), getattr(config, "patch_size", None)
    if not isinstance(width, int) or not isinstance(patch, int):
        raise ConfigError(
            f"{KEY}={name}: a {type(config).__name__} has no features of square patches; give a "
            "vision transformer, such as facebook/dinov2-base"
        )
    return width


def load_features(name: str, device: torch.device) -> VisionFeatures:
    """The frozen model, float32 on `device`; safetensors only. Raises ConfigError."""
    model = _from_transformers("AutoModel", name, use_safetensors=True, dtype=torch.float32)
    model = getattr(model, "vision_model", model)
    try:
        processor = json.loads((Path(name) / "preprocessor_config.json").read_bytes())
        constants = processor["image_mean"], processor["image_std"]
    except (OSError, ValueError, KeyError):
        constants = IMAGENET_MEAN, IMAGENET_STD  # as DINO's
    return VisionFeatures(model, *constants).to(device)


def weight_at(weight: float, final_weight: float, *, step: int, num_steps: int) -> float:
    """Linear from `weight` at step 0 to `final_weight` at the last."""
    return weight + (final_weight - weight) * min(1.0, step / max(1, num_steps - 1))
