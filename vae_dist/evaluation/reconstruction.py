"""How near reconstructions are to images: PSNR, SSIM, MS-SSIM, LPIPS.

In: images and the means of p(x | z = E[z|x]) in [0, 1], so the data range is 1. Out: means over all
images, each image's value computed alone and summed in float64.

    PSNR = -10 log10 mean((x - y)^2), dB
    SSIM, MS-SSIM: Gaussian window of 11 pixels, sigma 1.5, five scales (Wang et al. 2004, 2003)

The mean of a distribution is smooth where a draw of it is not: these figures say what the latent
keeps, not how natural an image looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vae_dist.config.errors import ConfigError
from vae_dist.distributed import Runtime
from vae_dist.evaluation.meter import Report, Seen, in_colour
from vae_dist.models.perceptual import Lpips

LARGEST_PSNR_DB = 100.0  # of an image that is reconstructed exactly, whose PSNR has no bound
SSIM_PIXELS = 11  # the window
MS_SSIM_PIXELS = 176  # the window at the fifth scale
VALUES_AT_ONCE = 2**20  # of the images that go through a metric together: 85 of 64x64 RGB

# images, reconstructions (b, C, H, W) in [0, 1] -> (b,)
Compare = Callable[[Tensor, Tensor], Tensor]


def psnr_db(images: Tensor, reconstructions: Tensor) -> Tensor:
    squares = (images - reconstructions).double().square().flatten(1).mean(1)
    return -10 * torch.log10(squares.clamp(min=10 ** (-LARGEST_PSNR_DB / 10)))


def comparisons(names: Sequence[str]) -> dict[str, tuple[Compare, int]]:
    """The functions of `names`, and the smallest side of an image that each one takes.

    Raises ConfigError where the package is missing that has them.
    """
    found: dict[str, tuple[Compare, int]] = {}
    if "psnr" in names:
        found["psnr_db"] = (psnr_db, 1)
    if "ssim" in names or "ms_ssim" in names:
        try:
            from torchmetrics.functional.image import (
                multiscale_structural_similarity_index_measure as ms_ssim,
            )
            from torchmetrics.functional.image import structural_similarity_index_measure as ssim
        except ImportError:
            raise ConfigError(
                "metrics=ssim and metrics=ms_ssim need torchmetrics: "
                "pip install 'vae_dist[metrics]'"
            ) from None
        if "ssim" in names:
            found["ssim"] = (_per_image(ssim), SSIM_PIXELS)
        if "ms_ssim" in names:
            found["ms_ssim"] = (_per_image(ms_ssim), MS_SSIM_PIXELS)
    return found


def _per_image(function: Callable[..., Any]) -> Compare:
    def compare(images: Tensor, reconstructions: Tensor) -> Tensor:
        # float64: a variance is the difference of two means, where an image is flat a small one
        pair = reconstructions.double(), images.double()
        values: Tensor = function(*pair, data_range=1.0, reduction="none")
        return values.reshape(len(images))  # torchmetrics squeezes a batch of one

    return compare


def lpips_comparison(network: Lpips) -> Compare:
    def compare(images: Tensor, reconstructions: Tensor) -> Tensor:
        distance: Tensor = network(2 * in_colour(images) - 1, 2 * in_colour(reconstructions) - 1)
        return distance

    return compare


class ReconstructionMeter:
    """Means of what `comparisons` returned, over the images that are large enough."""

    def __init__(self, compare: dict[str, tuple[Compare, int]], device: torch.device) -> None:
        self._compare = compare
        # of each: sum, images that count
        self._sums = torch.zeros(len(compare), 2, dtype=torch.float64, device=device)
        self._num_images = torch.zeros((), dtype=torch.float64, device=device)
        self._num_incomplete = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, seen: Seen) -> None:
        if seen.inputs.mask is not None:
            self._num_incomplete += len(seen.inputs.samples)
            return
        images, reconstructions = seen.pictures
        self._num_images += len(images)
        share = max(1, VALUES_AT_ONCE // math.prod(images.shape[1:]))
        for row, (function, smallest) in enumerate(self._compare.values()):
            if min(images.shape[-2:]) < smallest:
                continue
            for pair in zip(images.split(share), reconstructions.split(share), strict=True):
                self._sums[row, 0] += function(*pair).double().sum()
            self._sums[row, 1] += len(images)

    def report(self, runtime: Runtime) -> Report:
        sums = runtime.sum_over_ranks(self._sums).tolist()
        num_images = int(runtime.sum_over_ranks(self._num_images).item())
        if runtime.sum_over_ranks(self._num_incomplete).item():
            reason = "compares whole images, and data.mask says that pixels are missing"
            return Report({}, {name: f"{name} {reason}" for name in self._compare})
        report = Report()
        for (name, (_, smallest)), (total, count) in zip(self._compare.items(), sums, strict=True):
            if count:
                report.figures[name] = total / count
            if count < num_images:
                report.notes[name] = (
                    f"{num_images - int(count)} of {num_images} images have a side of less than "
                    f"{smallest} pixels, which {name} needs, and are left out of it"
                )
        return report
