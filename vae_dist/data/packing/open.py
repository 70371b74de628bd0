"""Which kind of source a path is, and what it holds.

In: `source=`: a folder, an archive, a list of archives, or the word mnist. Out: a `Source`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_dist.config.errors import ConfigError
from vae_dist.data.packing.archives import FolderSource, TarSource, ZipSource
from vae_dist.data.packing.arrays import (
    download_mnist,
    is_cifar,
    mnist_files,
    read_cifar,
    read_mnist,
)
from vae_dist.data.packing.items import SUFFIXES, Source
from vae_dist.data.packing.tables import (
    LabelledSource,
    ParquetSource,
    celeba_lists,
    read_csv,
)

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
KINDS = (
    f"a folder of pictures (.{', .'.join(SUFFIXES)}), a .zip, a .tar (also .gz, .bz2, .xz), a "
    "folder with the MNIST idx files, the CIFAR-10 archive, a folder with CelebA's lists, parquet "
    "files, or the word mnist"
)


def open_source(spec: Any, *, labels: str, work_folder: Path) -> Source:
    """The source that `source=` names, with the labels of a CSV file where one is given.

    Raises ConfigError when nothing is there, or nothing that can be packed.
    """
    paths = [str(part) for part in spec] if isinstance(spec, Sequence) else [str(spec)]
    paths = [str(spec)] if isinstance(spec, str) else paths
    if paths == ["mnist"] and not Path("mnist").exists():
        download_mnist(work_folder / "mnist")
        return read_mnist(work_folder / "mnist")
    missing = [path for path in paths if not Path(path).exists()]
    if missing or not paths:
        raise ConfigError(f"source={','.join(missing) or '[]'}: no such file; give {KINDS}")
    source, folder = _open(paths, work_folder)
    table = celeba_lists(folder)
    if labels:
        return LabelledSource(source, read_csv(Path(labels)), f"labels={labels}")
    if table is not None:
        return LabelledSource(source, table, f"{folder}/list_eval_partition")
    return source


def _open(paths: list[str], work_folder: Path) -> tuple[Source, Path]:
    """The source, and the folder in which lists about it may lie."""
    first = Path(paths[0])
    if len(paths) == 1 and is_cifar(first):
        return read_cifar(first), first.parent
    if len(paths) == 1 and first.is_dir():
        return _open_folder(first, work_folder), first
    if len(paths) == 1 and first.suffix == ".zip":
        return ZipSource(first), first.parent
    if all(path.endswith(TARS) for path in paths):
        return TarSource(paths, work_folder=work_folder), first.parent
    if all(path.endswith(".parquet") for path in paths):
        return ParquetSource(paths, work_folder=work_folder), first.parent
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
