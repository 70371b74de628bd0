"""Weights of published networks that metrics are defined by: found on disk, or downloaded once.

In: a file as its authors publish it. Out: its tensors on the CPU. It is looked up in the folder
that is given, else where torch.hub keeps its downloads (TORCH_HOME), and downloaded there if it is
missing. Its name carries the start of its SHA-256, which is checked before it is read.
What is read cannot run code: safetensors, or torch.load(weights_only=True).
"""

from __future__ import annotations

import hashlib
import socket
import sys
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from vae_dist.config.errors import ConfigError

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class PretrainedFile:
    """`url` ends in the file's name; `sha256` is the start of its digest."""

    network: str
    url: str
    sha256: str
    megabytes: int

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


VGG16 = PretrainedFile(
    "VGG16", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af", 528
)
ALEXNET = PretrainedFile(
    "AlexNet", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79", 233
)
INCEPTION = PretrainedFile(
    "the InceptionV3 of the FID",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
    91,
)


def hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def find(file: PretrainedFile, folder: Path | None = None) -> Path | None:
    """Where the file lies on this machine, None where it does not."""
    names = (f"{Path(file.name).stem}.safetensors", file.name)
    paths = [(folder or hub_folder()) / name for name in names]
    return next((path for path in paths if path.is_file()), None)


def fetch(file: PretrainedFile, folder: Path | None = None) -> Path:
    """Where the file lies, downloaded if it must be; for one process only.

    Raises ConfigError that says what to fetch from where, and where to put it.
    """
    folder = folder or hub_folder()
    if (found := find(file, folder)) is not None:
        _check(file, found)
        return found
    path = folder / file.name
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(TIMEOUT_S)
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            file.url, str(path), hash_prefix=file.sha256, progress=sys.stderr.isatty()
        )
    except (OSError, urllib.error.URLError, RuntimeError) as error:  # RuntimeError: another digest
        raise ConfigError(
            f"the weights of {file.network} are not in {folder} and cannot be downloaded "
            f"({error}); fetch {file.url} ({file.megabytes} MB) where there is a network, and put "
            f"it into {folder}, or into a folder of your own with metric_weights=FOLDER"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    return path


def _check(file: PretrainedFile, path: Path) -> None:
    """A .safetensors made from the file has its own digest; its tensors' names and shapes are
    checked when they are loaded."""
    if path.suffix == ".safetensors":
        return
    with open(path, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if not digest.startswith(file.sha256):
        raise ConfigError(
            f"{path}: its SHA-256 begins with {digest[:8]}, that of {file.network} with "
            f"{file.sha256}: damaged or another file; remove it and fetch {file.url}"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return tensors
    except Exception as error:  # torch.load raises whatever its reader met
        raise ConfigError(f"{path}: cannot be read as weights ({error})") from None


def load_into(network: nn.Module, tensors: dict[str, Tensor], *, path: Path) -> None:
    """Gives `network`, which may be on meta, these tensors; then it is on the CPU, in eval mode,
    and not to be trained.

    Tensors that it does not have (a classifier's) are left out. Raises ConfigError for those that
    it misses or that have other shapes.
    """
    network.to_empty(device="cpu")
    own = network.state_dict()
    needed = {name: tensors[name] for name in own if name in tensors}
    # counts of training steps, which older files lack and evaluation does not read
    missing = [n for n in own if n not in needed and not n.endswith("num_batches_tracked")]
    other = [name for name, tensor in needed.items() if tensor.shape != own[name].shape]
    if missing or other:
        first = (missing or other)[0]
        raise ConfigError(
            f"{path}: these are weights of another network: {len(missing)} tensors are missing and "
            f"{len(other)} have other shapes, for example {first}"
        )
    network.load_state_dict(needed, strict=False)
    network.eval().requires_grad_(False)
