"""The InceptionV3 that the Frechet inception distance is defined by, up to its last pooling.

In: images (B, 3, H, W) in [0, 1], of any size, resized to 299 x 299 (bilinear). Out: features
(B, 2048), float32. It is the network of the TensorFlow graph of December 2015: average pools do not
count their padding, and the last block has a maximum in their place. Parameters carry the names of
torchvision's `inception_v3`, which `pt_inception-2015-12-05` uses, without the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.models.pretrained import load_into, read_tensors

NUM_FEATURES = 2048
SIDE = 299  # pixels

Kernel = tuple[int, int]
# layers that work side by side, by name: width and kernel
Step = dict[str, tuple[int, Kernel]]
Branch = tuple[Step, ...]  # one after the other
Pool = Literal["average", "maximum", "down"]

ONE, THREE, FIVE = (1, 1), (3, 3), (5, 5)
ROW, COLUMN = (1, 7), (7, 1)
SHORT_ROW, SHORT_COLUMN = (1, 3), (3, 1)


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, in_channels: int, width: int, kernel: Kernel, *, stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(
            in_channels, width, kernel, stride=stride, padding=padding, bias=False
        )
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, then a pooled one: `branch_pool` behind it, or, where the block halves
    the resolution (pool="down"), nothing."""

    def __init__(
        self, in_channels: int, branches: Sequence[Branch], *, pool: Pool, pool_width: int = 0
    ) -> None:
        super().__init__()
        self.pool = pool
        self._branches = branches
        self.out_channels = in_channels if pool == "down" else pool_width
        for branch in branches:
            channels = in_channels
            for step in branch:
                # the last layer of each branch halves the resolution, without padding
                down = pool == "down" and step is branch[-1]
                for name, (width, kernel) in step.items():
                    layer = Convolution(
                        channels, width, kernel, stride=2 if down else 1, padded=not down
                    )
                    self.add_module(name, layer)
                channels = sum(width for width, _ in step.values())
            self.out_channels += channels
        if pool != "down":
            self.branch_pool = Convolution(in_channels, pool_width, ONE)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self._branches:
            h = x
            for step in branch:
                h = torch.cat([self.get_submodule(name)(h) for name in step], 1)
            outputs.append(h)
        if self.pool == "down":
            outputs.append(F.max_pool2d(x, 3, stride=2))
        elif self.pool == "maximum":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            outputs.append(self.branch_pool(pooled))
        return torch.cat(outputs, 1)


def _at_35(in_channels: int, pool_width: int) -> Mixed:
    """35 x 35 positions."""
    branches: list[Branch] = [
        ({"branch1x1": (64, ONE)},),
        ({"branch5x5_1": (48, ONE)}, {"branch5x5_2": (64, FIVE)}),
        (
            {"branch3x3dbl_1": (64, ONE)},
            {"branch3x3dbl_2": (96, THREE)},
            {"branch3x3dbl_3": (96, THREE)},
        ),
    ]
    return Mixed(in_channels, branches, pool="average", pool_width=pool_width)


def _at_17(width: int) -> Mixed:
    """17 x 17 positions."""
    branches: list[Branch] = [
        ({"branch1x1": (192, ONE)},),
        (
            {"branch7x7_1": (width, ONE)},
            {"branch7x7_2": (width, ROW)},
            {"branch7x7_3": (192, COLUMN)},
        ),
        (
            {"branch7x7dbl_1": (width, ONE)},
            {"branch7x7dbl_2": (width, COLUMN)},
            {"branch7x7dbl_3": (width, ROW)},
            {"branch7x7dbl_4": (width, COLUMN)},
            {"branch7x7dbl_5": (192, ROW)},
        ),
    ]
    return Mixed(768, branches, pool="average", pool_width=192)


def _at_8(in_channels: int, pool: Pool) -> Mixed:
    """8 x 8 positions."""
    branches: list[Branch] = [
        ({"branch1x1": (320, ONE)},),
        (
            {"branch3x3_1": (384, ONE)},
            {"branch3x3_2a": (384, SHORT_ROW), "branch3x3_2b": (384, SHORT_COLUMN)},
        ),
        (
            {"branch3x3dbl_1": (448, ONE)},
            {"branch3x3dbl_2": (384, THREE)},
            {"branch3x3dbl_3a": (384, SHORT_ROW), "branch3x3dbl_3b": (384, SHORT_COLUMN)},
        ),
    ]
    return Mixed(in_channels, branches, pool=pool, pool_width=192)


def _to_17() -> Mixed:
    branches: list[Branch] = [
        ({"branch3x3": (384, THREE)},),
        (
            {"branch3x3dbl_1": (64, ONE)},
            {"branch3x3dbl_2": (96, THREE)},
            {"branch3x3dbl_3": (96, THREE)},
        ),
    ]
    return Mixed(288, branches, pool="down")


def _to_8() -> Mixed:
    branches: list[Branch] = [
        ({"branch3x3_1": (192, ONE)}, {"branch3x3_2": (320, THREE)}),
        (
            {"branch7x7x3_1": (192, ONE)},
            {"branch7x7x3_2": (192, ROW)},
            {"branch7x7x3_3": (192, COLUMN)},
            {"branch7x7x3_4": (192, THREE)},
        ),
    ]
    return Mixed(768, branches, pool="down")


class FidInception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, THREE, stride=2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, THREE, padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, THREE)
        self.Conv2d_3b_1x1 = Convolution(64, 80, ONE)
        self.Conv2d_4a_3x3 = Convolution(80, 192, THREE, padded=False)
        self.Mixed_5b = _at_35(192, 32)
        self.Mixed_5c = _at_35(256, 64)
        self.Mixed_5d = _at_35(288, 64)
        self.Mixed_6a = _to_17()
        self.Mixed_6b = _at_17(128)
        self.Mixed_6c = _at_17(160)
        self.Mixed_6d = _at_17(160)
        self.Mixed_6e = _at_17(192)
        self.Mixed_7a = _to_8()
        self.Mixed_7b = _at_8(1280, "average")
        self.Mixed_7c = _at_8(2048, "maximum")

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


def load_inception(path: Path) -> FidInception:
    """With the weights of the file at `path`. Raises ConfigError where they do not fit."""
    with torch.device("meta"):
        network = FidInception()
    load_into(network, read_tensors(path), path=path)
    return network
