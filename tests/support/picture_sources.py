"""Small sources of pictures, opened as `pack` opens them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from vae_dist.packing.items import Item, Listing
from vae_dist.packing.open import open_source


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def summary(items: list[Item]) -> dict[str, tuple[str | None, object]]:
    return {item.name: (item.split, item.category) for item in items}


def opened(path: Path, work: Path, *, labels: str = "") -> tuple[Listing, list[tuple[str, bytes]]]:
    source = open_source(str(path), labels=labels, work_folder=work)
    listing = source.list()
    return listing, [source.read(item) for item in listing.items]


def write_tar(
    path: Path, members: dict[str, bytes], mode: str = "w", *, link: str | None = None
) -> None:
    """link: name of a member that points out of the tar."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        if link is not None:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(member)
