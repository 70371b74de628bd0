"""A perceptual distance without weights: structural similarity and gradients at several scales.

In: pairs of images (B, C, H, W) in [-1, 1]. Out: distances (B,), float32, 0 for equal images,

    d = 1/S sum over scales s of [ 1 - SSIM_s + mean |dx (x_s - y_s)| + mean |dy (x_s - y_s)| ]

x_0 = x, and x_s+1 is x_s averaged over squares of 2x2 pixels. SSIM (Wang et al. 2004) has a
Gaussian window of 11 pixels, sigma 1.5, inside the image only, and is the mean over pixels and
channels; dx, dy are differences of neighbours. SSIM asks that local structure has the right
contrast, where squared errors forgive blur; the gradients place the edges. A scale is used as long
as the window fits, three of them at most: 44 pixels on the shorter side have all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 11  # pixels
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
        if not scales:
            raise ValueError(
                f"images of {first.shape[-2]}x{first.shape[-1]} pixels are smaller than the window "
                f"of {WINDOW} pixels that perceptual.kind=structure compares"
            )
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
        # variances are differences of means that nearly cancel where an image is flat: the caller
        # keeps this float32
        var_x, var_y = xx - mean_x.square(), yy - mean_y.square()
        covariance = xy - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
        structure = (2 * covariance + C2) / (var_x + var_y + C2)
        return (luminance * structure).flatten(1).mean(1)

    def _blurred(self, x: Tensor) -> Tensor:
        # as channels of a grouped convolution: as images of one channel each, which CPU kernels
        # pad to 16, it took 20 to 50 times as long, and most of a step's memory
        channels = x.shape[1]
        down = self.window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
        across = self.window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
        return F.conv2d(F.conv2d(x, down, groups=channels), across, groups=channels)


def gradient_error(error: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, across and down, (B,)."""
    across = (error[..., :, 1:] - error[..., :, :-1]).abs().flatten(1).mean(1)
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().flatten(1).mean(1)
    return across + down
