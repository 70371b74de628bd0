"""LPIPS, the perceptual distance of Zhang et al. 2018, on the features of VGG16 or AlexNet.

In: pairs of images (B, 3, H, W) in [-1, 1]. Out: distances (B,), float32,

    d = sum over 5 layers of mean over pixels of w_l . (u_l(x) - u_l(y))^2

with u_l the features of layer l, normalised at each pixel, and w_l >= 0 weights that were fitted to
human judgements (v0.1). Parameters carry the names of torchvision's `vgg16` and `alexnet`
(`features.N.weight`) and of the published heads (`linK.model.1.weight`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vae_dist.config.errors import ConfigError
from vae_dist.models.pretrained import (
    ALEXNET,
    VGG16,
    PretrainedFile,
    find,
    load_into,
    read_tensors,
)

Backbone = Literal["vgg", "alex"]

# of ImageNet's mean and deviation, as they are for images in [-1, 1]
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

WIDTHS: dict[Backbone, tuple[int, ...]] = {
    "vgg": (64, 128, 256, 512, 512),
    "alex": (64, 192, 384, 256, 256),
}
# the layers of `features` after which features are taken: the last ReLU of each level
TAPS: dict[Backbone, tuple[int, ...]] = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
SMALLEST_SIDE: dict[Backbone, int] = {"vgg": 16, "alex": 31}  # pixels


FILES: dict[Backbone, PretrainedFile] = {"vgg": VGG16, "alex": ALEXNET}


def vgg16_features() -> nn.Sequential:
    """Up to the last ReLU; torchvision has one more pooling."""
    layers: list[nn.Module] = []
    channels = 3
    for level, (width, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if level:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


def alexnet_features() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


class Lpips(nn.Module):
    """`features.*` and `linK.model.1.weight` (1, C_K, 1, 1) are its parameters."""

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.features = vgg16_features() if backbone == "vgg" else alexnet_features()
        for number, width in enumerate(WIDTHS[backbone]):
            head = nn.Conv2d(width, 1, 1, bias=False)
            self.add_module(f"lin{number}", _Head(head))
        self.set_constants()

    def set_constants(self) -> None:
        """Those that no file holds, on the CPU. As buffers, since a device would be waited for by a
        copy in each forward."""
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            constant = torch.tensor(values, device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        shift, scale = self.shift.to(first.dtype), self.scale.to(first.dtype)
        h = (torch.cat([first, second]) - shift) / scale
        distance = first.new_zeros(len(first))
        taps = TAPS[self.backbone]
        for number, layer in enumerate(self.features):
            h = layer(h)
            if number in taps:
                # 1e-8 inside the root, as the reference implementation in torchmetrics has it
                unit = h / torch.sqrt(1e-8 + h.square().sum(1, keepdim=True))
                x, y = unit.chunk(2)
                head = getattr(self, f"lin{taps.index(number)}")
                distance = distance + head((x - y).square()).mean((1, 2, 3))
        return distance


class _Head(nn.Module):
    """A 1x1 convolution under its published name; place 0 is a dropout, which evaluation skips."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), convolution)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.model(x)
        return h


def find_heads(backbone: Backbone, folder: Path | None = None) -> Path | None:
    """The fitted weights w_l: in the folder under a name that they are published by, else those
    that torchmetrics ships; None where there are none."""
    names = [f"{backbone}_lpips.pth", f"{backbone}.pth"]
    paths = [folder / name for name in names] if folder else []
    package = importlib.util.find_spec("torchmetrics")
    if package is not None and package.origin is not None:
        paths.append(Path(package.origin).parent / "functional/image/lpips_models" / names[1])
    return next((path for path in paths if path.is_file()), None)


def lpips_is_at_hand(backbone: Backbone, folder: Path | None = None) -> bool:
    """Whether `load_lpips` needs no network."""
    return find(FILES[backbone], folder) is not None and find_heads(backbone, folder) is not None


def load_lpips(backbone: Backbone, path: Path) -> Lpips:
    """With the features of the file at `path`, and the heads beside it or in torchmetrics.

    Raises ConfigError where either cannot be read. Gradients flow to the images alone.
    """
    heads = find_heads(backbone, path.parent)
    if heads is None:
        raise ConfigError(
            f"LPIPS needs its heads: put {backbone}.pth of the package lpips into {path.parent}, "
            "or install torchmetrics, which ships them: pip install 'vae_dist[metrics]'"
        )
    with torch.device("meta"):
        network = Lpips(backbone)
    load_into(network, read_tensors(path) | read_tensors(heads), path=path)
    network.set_constants()  # which a network that was on meta has lost
    return network
