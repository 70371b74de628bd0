"""Published networks that metrics and losses are defined by: LPIPS and the Inception of the FID.

Their weights are files as the authors publish them, looked up in the folder that is given, else
where torch.hub keeps its downloads (TORCH_HOME), and downloaded there if they are missing. A file's
SHA-256 is checked before it is read, by torch.load(weights_only=True), which runs no code.
Parameters carry torchvision's names.

`Lpips` (Zhang et al. 2018, v0.1), on features u_l of VGG16 or AlexNet, normalised at each pixel:

    d = sum over 5 layers of mean over pixels of w_l . (u_l(x) - u_l(y))^2

with w_l >= 0 fitted to human judgements. In: pairs of images (B, 3 or 1, H, W) in [-1, 1]; out:
(B,).

`FidInception` is the InceptionV3 of the TensorFlow graph of December 2015, up to its last pooling:
average pools do not count their padding, and the last block has a maximum in their place. In:
images (B, 3, H, W) in [0, 1], resized to 299 x 299 (bilinear); out: features (B, 2048).
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.config.errors import ConfigError


class PretrainedFile(NamedTuple):
    """`url` ends in the file's name; `sha256` is its whole digest."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


VGG16 = PretrainedFile(
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
ALEXNET = PretrainedFile(
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
)
INCEPTION = PretrainedFile(
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)


def path_of(file: PretrainedFile, folder: str = "") -> Path:
    """Where the file belongs on this machine."""
    return (Path(folder) if folder else Path(torch.hub.get_dir()) / "checkpoints") / file.name


def fetch(file: PretrainedFile, folder: str = "") -> Path:
    """Where the file lies, downloaded if it must be; for one process only. Raises ConfigError that
    says what to fetch from where, and where to put it."""
    path = path_of(file, folder)
    if path.is_file():
        with open(path, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != file.sha256:
            raise ConfigError(
                f"{path}: its SHA-256 is {digest}, not {file.sha256}: damaged or another file; "
                f"remove it and fetch {file.url}"
            )
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            file.url, str(path), hash_prefix=file.sha256, progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: another digest
        raise ConfigError(
            f"{path}: is not there and cannot be downloaded ({error}); fetch {file.url} where "
            "there is a network, and put it there, or into the FOLDER of metric_weights= or "
            "perceptual.weights="
        ) from None
    return path


def load_into(network: nn.Module, *paths: Path) -> None:
    """Gives `network`, which is on meta, the tensors of these files; then it is in eval mode, and
    not to be trained. Tensors that it does not have (a classifier's) are left out. Raises
    ConfigError for those that it misses or that have other shapes."""
    own = network.state_dict()
    # counts of training steps, which older files lack and evaluation does not read
    tensors = {name: torch.tensor(0) for name in own if name.endswith("num_batches_tracked")}
    for path in paths:
        try:
            tensors |= torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever its reader met
            raise ConfigError(f"{path}: cannot be read as weights ({error})") from None
    given = {name: tensor for name, tensor in tensors.items() if name in own}
    wrong = [name for name in own if name not in given or given[name].shape != own[name].shape]
    if wrong:
        raise ConfigError(
            f"{paths[0]}: these are weights of another network: {len(wrong)} tensors are missing "
            f"or have other shapes, for example {wrong[0]}"
        )
    network.load_state_dict(given, assign=True)
    network.eval().requires_grad_(False)


# LPIPS

# of ImageNet's mean and deviation, as they are for images in [-1, 1]
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Trunk(NamedTuple):
    file: PretrainedFile
    heads: str  # the file of the w_l
    taps: dict[int, int]  # layer of `features`, the last ReLU of a level -> channels
    smallest_side: int  # pixels


TRUNKS = {
    "lpips": Trunk(VGG16, "vgg.pth", {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}, 16),
    "lpips_alex": Trunk(ALEXNET, "alex.pth", {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}, 31),
}


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
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for before, width in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class Lpips(nn.Module):
    """`features.*` and `linK.model.1.weight` (1, C_K, 1, 1), the published heads, are its
    parameters."""

    shift: Tensor
    scale: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.features = vgg16_features() if kind == "lpips" else alexnet_features()
        self.taps = list(TRUNKS[kind].taps)
        for number, width in enumerate(TRUNKS[kind].taps.values()):
            # place 0 of a published head is a dropout, which evaluation skips
            head = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{number}", nn.ModuleDict({"model": head}))
        # buffers: a forward would wait for a copy to the device. On the CPU, since no file has them
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            constant = torch.tensor(values, device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        h = (torch.cat([first, second]) - self.shift) / self.scale  # grey to three channels
        distance = first.new_zeros(len(first))
        for number, layer in enumerate(self.features):
            h = layer(h)
            if number in self.taps:
                # 1e-8 inside the root, as the reference implementation in torchmetrics has it
                unit = h / torch.sqrt(1e-8 + h.square().sum(1, keepdim=True))
                x, y = unit.chunk(2)
                head = getattr(self, f"lin{self.taps.index(number)}")["model"]
                distance = distance + head((x - y).square()).mean((1, 2, 3))
        return distance


def find_heads(kind: str) -> Path | None:
    """The fitted weights w_l, which torchmetrics ships; None where it is not installed."""
    package = importlib.util.find_spec("torchmetrics")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "functional/image/lpips_models" / TRUNKS[kind].heads


def lpips_available(kind: str, folder: str = "") -> bool:
    """Whether `load_lpips` needs no network."""
    return path_of(TRUNKS[kind].file, folder).is_file() and find_heads(kind) is not None


def load_lpips(kind: str, path: Path) -> Lpips:
    """With the features of the file at `path`. Raises ConfigError where it, or the heads, cannot be
    read. Gradients flow to the images alone."""
    heads = find_heads(kind)
    if heads is None:
        raise ConfigError("LPIPS has its heads from torchmetrics: pip install 'vae_dist[metrics]'")
    with torch.device("meta"):
        network = Lpips(kind)
    load_into(network, path, heads)
    return network


# Inception

NUM_FEATURES = 2048
SIDE = 299  # pixels

Layer = tuple[int, int, int]  # width, rows and columns of the kernel
Step = Layer | list[Layer]  # a list: layers side by side


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, layer: Layer, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        width, rows, columns = layer
        padding = (rows // 2, columns // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(channels, width, (rows, columns), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, then a pooled one: `branch_pool` behind it, or, where the block halves
    the resolution (pool="down"), nothing. Layer 2 of a branch NAME is NAME_2, or, of two that are
    side by side, NAME_2a and NAME_2b; a branch of one layer has no number."""

    def __init__(
        self,
        in_channels: int,
        branches: Mapping[str, Sequence[Step]],
        *,
        pool: Literal["average", "maximum", "down"],
        pool_width: int = 0,
    ) -> None:
        super().__init__()
        self.pool = pool
        self._branches: list[list[list[str]]] = []  # names, by branch and step
        for branch, steps in branches.items():
            channels, names = in_channels, []
            for number, step in enumerate(steps, 1):
                layers = step if isinstance(step, list) else [step]
                name = f"{branch}_{number}" if len(steps) > 1 else branch
                names.append([name + letter for letter in "ab"] if len(layers) > 1 else [name])
                # the last layer of each branch halves the resolution, without padding
                down = pool == "down" and number == len(steps)
                for own, layer in zip(names[-1], layers, strict=True):
                    module = Convolution(channels, layer, stride=1 + down, padded=not down)
                    self.add_module(own, module)
                channels = sum(width for width, _, _ in layers)
            self._branches.append(names)
        if pool != "down":
            self.branch_pool = Convolution(in_channels, (pool_width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self._branches:
            h = x
            for names in branch:
                h = torch.cat([self.get_submodule(name)(h) for name in names], 1)
            outputs.append(h)
        if self.pool == "down":
            outputs.append(F.max_pool2d(x, 3, stride=2))
        elif self.pool == "maximum":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            outputs.append(self.branch_pool(pooled))
        return torch.cat(outputs, 1)


def _mixed_blocks() -> dict[str, Mixed]:
    double: list[Step] = [(64, 1, 1), (96, 3, 3), (96, 3, 3)]
    wide: list[Layer] = [(384, 1, 3), (384, 3, 1)]
    at_35: dict[str, list[Step]] = {
        "branch1x1": [(64, 1, 1)],
        "branch5x5": [(48, 1, 1), (64, 5, 5)],
        "branch3x3dbl": double,
    }
    to_17: dict[str, list[Step]] = {"branch3x3": [(384, 3, 3)], "branch3x3dbl": double}
    to_8: dict[str, list[Step]] = {
        "branch3x3": [(192, 1, 1), (320, 3, 3)],
        "branch7x7x3": [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)],
    }
    at_8: dict[str, list[Step]] = {
        "branch1x1": [(320, 1, 1)],
        "branch3x3": [(384, 1, 1), wide],
        "branch3x3dbl": [(448, 1, 1), (384, 3, 3), wide],
    }

    def at_17(width: int) -> dict[str, list[Step]]:
        row, column = (width, 1, 7), (width, 7, 1)
        return {
            "branch1x1": [(192, 1, 1)],
            "branch7x7": [(width, 1, 1), row, (192, 7, 1)],
            "branch7x7dbl": [(width, 1, 1), column, row, column, (192, 1, 7)],
        }

    return {
        "Mixed_5b": Mixed(192, at_35, pool="average", pool_width=32),
        "Mixed_5c": Mixed(256, at_35, pool="average", pool_width=64),
        "Mixed_5d": Mixed(288, at_35, pool="average", pool_width=64),
        "Mixed_6a": Mixed(288, to_17, pool="down"),
        **{
            f"Mixed_6{letter}": Mixed(768, at_17(width), pool="average", pool_width=192)
            for letter, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192))
        },
        "Mixed_7a": Mixed(768, to_8, pool="down"),
        "Mixed_7b": Mixed(1280, at_8, pool="average", pool_width=192),
        "Mixed_7c": Mixed(2048, at_8, pool="maximum", pool_width=192),
    }


class FidInception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, (32, 3, 3), stride=2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, (32, 3, 3), padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, (64, 3, 3))
        self.Conv2d_3b_1x1 = Convolution(64, (80, 1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, (192, 3, 3), padded=False)
        for name, block in _mixed_blocks().items():
            self.add_module(name, block)

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
    load_into(network, path)
    return network
