"""Small sources of pictures, listed as `pack` lists them."""

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.packing.items import read
from vae_dist.packing.sources import list_source


def encoded(image, image_format="PNG", **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def png(seed=0):
    return encoded(np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array, **options):
    tifffile.imwrite(file := io.BytesIO(), array, **options)
    return file.getvalue()


def jpeg_with(pixels, kind, turn, xmp=0):
    """An orientation of a TIFF type (1 byte, 3 and 4 integers, 2 text), and one in XMP."""
    value = {1: bytes([turn]), 2: b"%d\0" % turn, 3: struct.pack("<H", turn)}.get(kind)
    value = (value or struct.pack("<I", turn)).ljust(4, b"\0")
    entry = struct.pack("<HHI", 0x0112, kind, 2 if kind == 2 else 1) + value
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)
    packet = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="%d"/>' % xmp
    records = ([exif] if turn else []) + ([packet] if xmp else [])
    segments = (b"\xff\xe1" + struct.pack(">H", len(r) + 2) + r for r in records)
    whole = encoded(pixels, "JPEG")
    return whole[:2] + b"".join(segments) + whole[2:]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def opened(source, work, **keys):
    """What a source holds, and the bytes of its pictures."""
    spec = str(source) if isinstance(source, Path) else source
    listing = list_source(PackCommand(source=spec, **keys), work=work)
    return listing, [read(item.place) for item in listing.items]


def refused(source, work, message, **keys):
    with pytest.raises(ConfigError, match=message):
        opened(source, work, **keys)


def write(path, files, mode="w"):
    """The files in a folder, .zip or .tar of that name; a link of a tar is (type, target)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    elif ".tar" in path.name:
        with tarfile.open(path, mode) as tar:
            for name, found in files.items():
                member = tarfile.TarInfo(name)
                data = found if isinstance(found, bytes) else b""
                if found is not data:
                    member.type, member.linkname = found
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path
