"""The perceptual term: how far reconstructions look from images, in nats.

    term = weight * C*H*W * d(reconstruction, image)         d: structure, or LPIPS

so that `weight` is nats of each value for a distance of 1, whatever the size of the image.
`structure` has no weights:

    d = 1/S sum over scales s of [ 1 - SSIM_s + mean |dx (x_s - y_s)| + mean |dy (x_s - y_s)| ]

x_0 = x, and x_s+1 is x_s averaged over squares of 2x2 pixels. SSIM (Wang et al. 2004) has a
Gaussian window of 11 pixels, sigma 1.5, inside the image only, and is the mean over pixels and
channels; dx, dy are differences of neighbours. A scale is used as long as the window fits, three
of them at most: 44 pixels on the shorter side have all. Distances are float32 outside autocast:
both kinds subtract what is nearly equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.config.schema import PerceptualConfig
from vae_dist.models.networks import TRUNKS, fetch, load_lpips

WINDOW = 11  # pixels, of the structure distance
SIGMA = 1.5  # pixels
MAX_SCALES = 3
DATA_RANGE = 2.0
C1, C2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2


def num_scales(height: int, width: int) -> int:
    """0 where the window does not fit at all."""
    side = min(height, width)
    return sum(side >> scale >= WINDOW for scale in range(MAX_SCALES))


class StructureDistance(nn.Module):
    """Callable: `(first, second) -> (B,)`. Has no parameters; differentiable in both images."""

    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        place = torch.arange(WINDOW, dtype=torch.float32) - WINDOW // 2
        window = torch.exp(-0.5 * (place / SIGMA) ** 2)
        self.register_buffer("window", window / window.sum(), persistent=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        scales = num_scales(*first.shape[-2:])
        distance = first.new_zeros(len(first))
        for scale in range(scales):
            if scale:
                first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
            distance = distance + 1.0 - self.ssim(first, second) + gradient_error(first - second)
        return distance / scales

    def ssim(self, x: Tensor, y: Tensor) -> Tensor:
        """Structural similarity of each pair at this resolution, (B,)."""
        parts = torch.cat([x, y, x * x, y * y, x * y], 1)
        mean_x, mean_y, xx, yy, xy = self._blurred(parts).chunk(5, 1)
        var_x, var_y = xx - mean_x.square(), yy - mean_y.square()
        covariance = xy - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
        structure = (2 * covariance + C2) / (var_x + var_y + C2)
        return (luminance * structure).flatten(1).mean(1)

    def _blurred(self, x: Tensor) -> Tensor:
        # channels of a grouped convolution: as images of one channel it took 20 times as long
        channels = x.shape[1]
        down = self.window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
        across = self.window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
        return F.conv2d(F.conv2d(x, down, groups=channels), across, groups=channels)


def gradient_error(error: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, across and down, (B,)."""
    across = (error[..., :, 1:] - error[..., :, :-1]).abs().flatten(1).mean(1)
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().flatten(1).mean(1)
    return across + down


class PerceptualTerm:
    """Callable: `(reconstructions, images) -> distances (B,)`, both (B, C, H, W) in [-1, 1]."""

    def __init__(self, distance: nn.Module, weight: float) -> None:
        self.distance, self.weight = distance.requires_grad_(False).eval(), weight
        # SSIM subtracts means of squares that nearly cancel: TF32 would round them by more than is
        # left where a picture is bright and flat
        self.needs_exact_float32 = isinstance(distance, StructureDistance)

    def __call__(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        distances: Tensor = self.distance(reconstructions.float(), images.float())
        return distances


def fetch_weights(config: PerceptualConfig) -> None:
    """Have the weight files on this machine, downloaded if need be; for one process only. Raises
    ConfigError."""
    if config.kind in TRUNKS:
        fetch(TRUNKS[config.kind].file, config.weights)


def build_perceptual(config: PerceptualConfig, device: torch.device) -> PerceptualTerm | None:
    """None for kind=none. `fetch_weights` comes first. Raises ConfigError."""
    if config.kind == "none":
        return None
    assert config.kind != "auto", "it is resolved when a run begins"
    distance: nn.Module = StructureDistance()
    if config.kind in TRUNKS:
        distance = load_lpips(config.kind, fetch(TRUNKS[config.kind].file, config.weights))
    return PerceptualTerm(distance.to(device), config.weight)


def smallest_side(config: PerceptualConfig) -> int:
    """Pixels of the shorter side of the smallest image that the term takes."""
    return TRUNKS[config.kind].smallest_side if config.kind in TRUNKS else WINDOW
