"""Which kind of source a path is, and what it holds.

In: `source=`: a folder, an archive, a list of archives, or the word mnist. Out: a `Source`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_dist.config.errors import ConfigError
from vae_dist.packing.archives import FolderSource, TarSource, ZipSource
from vae_dist.packing.arrays import (
    download_mnist,
    is_cifar,
    mnist_files,
    read_cifar,
    read_mnist,
)
from vae_dist.packing.items import SUFFIXES, Source
from vae_dist.packing.tables import (
    LabelledSource,
    ParquetSource,
    celeba_lists,
    read_celeba_lists,
    read_csv,
)

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
KINDS = (
    f"a folder of pictures (.{', .'.join(SUFFIXES)}), a .zip, a .tar (also .gz, .bz2, .xz), a "
    "folder with the MNIST idx files, the binary archive of CIFAR-10, a folder with CelebA's "
    "lists, parquet files, or the word mnist"
)


def open_source(spec: Any, *, labels: str, work_folder: Path) -> Source:
    """The source that `source=` names, with the labels of a CSV file where one is given.

    Raises ConfigError when nothing is there, or nothing that can be packed.
    """
    paths = _paths(spec)
    source: Source
    if _is_mnist(paths):
        download_mnist(work_folder / "mnist")
        source = read_mnist(work_folder / "mnist")
    else:
        missing = [path for path in paths if not Path(path).exists()]
        if missing or not paths:
            raise ConfigError(f"source={','.join(missing) or '[]'}: no such file; give {KINDS}")
        source = _open(paths, work_folder)
    if labels:
        return LabelledSource(source, read_csv(Path(labels)), f"labels={labels}")
    lists = _celeba_lists(paths)
    if lists:
        return LabelledSource(source, read_celeba_lists(*lists), str(lists[0].with_suffix("")))
    return source


def label_digest(spec: Any, labels: str) -> str:
    """Of what is in the files that label the pictures: the CSV file, or CelebA's lists; empty where
    none does. Raises ConfigError."""
    files = [Path(labels)] if labels else _celeba_lists(_paths(spec))
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            where = f"labels={file}" if labels else str(file)
            raise ConfigError(f"{where}: cannot be read ({error})") from error
    return digest.hexdigest() if files else ""


def _paths(spec: Any) -> list[str]:
    if isinstance(spec, str) or not isinstance(spec, Sequence):
        return [str(spec)]
    return [str(part) for part in spec]


def _is_mnist(paths: list[str]) -> bool:
    return paths == ["mnist"] and not Path("mnist").exists()


def _celeba_lists(paths: list[str]) -> list[Path]:
    """CelebA's lists in the folder of the source, or in the one that it lies in."""
    if not paths or _is_mnist(paths):
        return []
    first = Path(paths[0])
    inside = len(paths) == 1 and first.is_dir() and not is_cifar(first)
    return celeba_lists(first if inside else first.parent)


def _open(paths: list[str], work_folder: Path) -> Source:
    first = Path(paths[0])
    if len(paths) == 1 and is_cifar(first):
        return read_cifar(first)
    if len(paths) == 1 and first.is_dir():
        return _open_folder(first, work_folder)
    if len(paths) == 1 and first.suffix == ".zip":
        return ZipSource(first)
    if all(path.endswith(TARS) for path in paths):
        return TarSource(paths, work_folder=work_folder)
    if all(path.endswith(".parquet") for path in paths):
        return ParquetSource(paths, work_folder=work_folder)
    raise ConfigError(f"source={','.join(paths)}: is nothing that can be packed; give {KINDS}")


def _open_folder(folder: Path, work_folder: Path) -> Source:
    if mnist_files(folder):
        return read_mnist(folder)
    archive = folder / "img_align_celeba.zip"
    if archive.is_file():
        return ZipSource(archive)
    parquet = sorted(str(path) for path in folder.rglob("*.parquet"))
    if parquet:
        return ParquetSource(parquet, work_folder=work_folder)
    tars = sorted(str(path) for path in folder.iterdir() if path.name.endswith(TARS))
    if tars:
        return TarSource(tars, work_folder=work_folder)
    return FolderSource(folder)
