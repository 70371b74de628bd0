"""What a source is unpacked into: one plain file in the work folder, which its jobs share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")


def write_once(path: Path, write: Callable[[BinaryIO], T]) -> T:
    """Have a file written and renamed into place; what `write` answers.

    Jobs that write it at once, on whichever nodes, write the same bytes under names of their own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            answer = write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return answer
