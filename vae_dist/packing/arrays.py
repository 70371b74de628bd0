"""Data sets that come as arrays: MNIST idx files and CIFAR-10. Pictures become PNG, losslessly.

In: `train-images-idx3-ubyte[.gz]` and its three companions, in a folder or downloaded; the binary
archive of CIFAR-10, or its folder unpacked. The python archive is refused: loading a pickle can run
code.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

import numpy as np
from PIL import Image

from vae_dist.config.errors import ConfigError
from vae_dist.files import write_durably
from vae_dist.packing.items import Item, Listing

MNIST_PARTS = {"train": "train", "t10k": "test"}  # prefix of the files: split
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MNIST_SHA256 = {  # of the files unpacked: mirrors compress them differently
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
DOWNLOAD_TIMEOUT_S = 30
MAX_DOWNLOAD_BYTES = 1 << 26
CIFAR_SHAPE = (3, 32, 32)
CIFAR_RECORD = 1 + 3 * 32 * 32  # label, then the planes R, G, B
CIFAR_SPLITS = {"data_batch": "train", "test_batch": "test"}


class ArraySource:
    """Pictures that are held in memory: arrays (N, H, W) or (N, C, H, W) of uint8, by split."""

    def __init__(
        self,
        arrays: Mapping[str, tuple[np.ndarray, np.ndarray]],
        classes: Sequence[str] = (),
    ) -> None:
        self.arrays, self.classes = dict(arrays), tuple(classes)

    def list(self) -> Listing:
        items = [
            Item(f"{split} {i}", (split, i), images[0].size, split, int(label))
            for split, (images, labels) in self.arrays.items()
            for i, label in enumerate(labels.tolist())
        ]
        return Listing(items, [], self.classes)

    def read(self, item: Item) -> tuple[str, bytes]:
        split, i = item.place
        pixels = self.arrays[split][0][i]
        file = io.BytesIO()
        Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0)).save(file, "PNG")
        return "png", file.getvalue()


# MNIST


def mnist_files(folder: Path) -> bool:
    return any((folder / f"train-images-idx3-ubyte{end}").is_file() for end in ("", ".gz"))


def read_mnist(folder: Path) -> ArraySource:
    """The idx files of a folder. Raises ConfigError for a missing or damaged one."""
    arrays = {}
    for prefix, split in MNIST_PARTS.items():
        images = read_idx(_found(folder, f"{prefix}-images-idx3-ubyte"))
        labels = read_idx(_found(folder, f"{prefix}-labels-idx1-ubyte"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ConfigError(
                f"source={folder}: {prefix} images {images.shape} and labels {labels.shape} do "
                "not belong together"
            )
        arrays[split] = (images, labels)
    return ArraySource(arrays)


def _found(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ConfigError(f"source={folder}: {name}[.gz] is missing; copy it there")


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an idx file, unpacked if it is a .gz. Raises ConfigError."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); copy it again") from error
    num_axes = data[3] if len(data) > 3 else 0
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * num_axes:
        raise ConfigError(f"{path}: is no idx file of unsigned bytes")
    shape = tuple(np.frombuffer(data, ">u4", num_axes, offset=4).tolist())
    wanted = int(np.prod(shape, dtype=object))
    if len(data) - 4 - 4 * num_axes != wanted:
        raise ConfigError(
            f"{path}: {len(data) - 4 - 4 * num_axes} bytes of pixels, but its header {shape} "
            f"means {wanted}; copy it again"
        )
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def download_mnist(
    folder: Path,
    *,
    mirrors: Sequence[str] = MNIST_MIRRORS,
    sha256: Mapping[str, str] = MNIST_SHA256,
) -> None:
    """Fetch the idx files that are missing from the first mirror that has them, checked.

    Raises ConfigError with what each mirror answered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, digest in sha256.items():
        if (folder / name).is_file():
            continue
        answers = []
        for mirror in mirrors:
            try:
                data = _fetch(f"{mirror}{name}.gz")
            except (OSError, EOFError, ValueError, zlib.error, HTTPException) as error:
                answers.append(f"{mirror}: {error}")
                continue
            if hashlib.sha256(data).hexdigest() == digest:
                write_durably(folder / name, data)
                break
            answers.append(f"{mirror}: another file, its checksum differs")
        else:
            raise ConfigError(
                [
                    f"source=mnist: {name} cannot be downloaded:",
                    *(f"  {answer}" for answer in answers),
                    "copy the four idx files to a folder and give it as source=FOLDER",
                ]
            )


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as answer:
        data = answer.read(MAX_DOWNLOAD_BYTES + 1)
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ValueError("the answer is too large")
    return gzip.decompress(data)


# CIFAR-10


def is_cifar(path: Path) -> bool:
    """Whether this is a folder or an archive of CIFAR-10; `read_cifar` refuses the pickles."""
    if path.is_dir():
        return any((path / f"data_batch_1{end}").is_file() for end in ("", ".bin"))
    return path.name.startswith("cifar-10-") and path.name.endswith((".tar.gz", ".tar"))


def read_cifar(path: Path) -> ArraySource:
    """The batches of a folder or an archive. Raises ConfigError."""
    arrays: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "test": []}
    classes: tuple[str, ...] = ()
    for name, data in _cifar_files(path):
        where = f"source={path}: {name}"
        split = next((s for part, s in CIFAR_SPLITS.items() if name.startswith(part)), None)
        if split is not None and not name.endswith(".bin"):
            raise ConfigError(
                f"{where} is a Python pickle, which can run code and is not loaded; give the "
                "binary archive (cifar-10-binary.tar.gz, from the same page), or the parquet files "
                "of the hub's data set uoft-cs/cifar10"
            )
        if split is not None:
            arrays[split].append(_binary_batch(data, where))
        elif name == "batches.meta.txt":
            classes = tuple(data.decode("utf-8", "replace").split())
    if not arrays["train"] or not arrays["test"]:
        raise ConfigError(f"source={path}: the batches of CIFAR-10 are missing; copy it again")
    joined = {
        split: (np.concatenate([i for i, _ in parts]), np.concatenate([n for _, n in parts]))
        for split, parts in arrays.items()
    }
    return ArraySource(joined, classes)


def _cifar_files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for batch in sorted(path.iterdir()):
            if batch.is_file():
                yield batch.name, batch.read_bytes()
        return
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive, key=lambda member: member.name):
                file = archive.extractfile(member) if member.isreg() else None
                if file is not None:
                    yield member.name.rpartition("/")[2], file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"source={path}: cannot be read ({error}); copy it again") from error


def _binary_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    if not data or len(data) % CIFAR_RECORD:
        raise ConfigError(
            f"{where}: {len(data)} bytes are no multiple of {CIFAR_RECORD}; copy it again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, CIFAR_RECORD)
    return records[:, 1:].reshape(-1, *CIFAR_SHAPE), records[:, 0]
