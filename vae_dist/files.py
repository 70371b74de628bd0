"""Files that a kill cannot tear: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def write_durably(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file, given whole or in pieces, under a temporary name, sync it, and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            for piece in [data] if isinstance(data, bytes) else data:
                rest = memoryview(piece)
                while rest:  # an unbuffered write may take a part
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
