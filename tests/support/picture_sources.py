"""Small sources of pictures, listed as `pack` lists them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from vae_dist.config.commands import PackCommand
from vae_dist.packing.items import Item, Listing, read
from vae_dist.packing.sources import list_source


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def summary(items: list[Item]) -> dict[str, tuple[str | None, object]]:
    return {item.name: (item.split, item.category) for item in items}


def listed(source: object, work: Path, **keys: str) -> Listing:
    spec = str(source) if isinstance(source, Path) else source
    return list_source(PackCommand(source=spec, **keys), work=work)


def opened(source: object, work: Path, **keys: str) -> tuple[Listing, list[bytes]]:
    listing = listed(source, work, **keys)
    return listing, [read(item.place) for item in listing.items]


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(
    path: Path,
    members: dict[str, bytes],
    mode: str = "w",
    *,
    links: dict[str, tuple[bytes, str]] | None = None,
) -> Path:
    """links: kind and target by name."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, (kind, target) in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return path
