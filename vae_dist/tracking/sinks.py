"""Where metrics and pictures go: one small protocol, `log.jsonl` and TensorBoard.

In: rows {"group/name": value} and PNG files, each at an optimizer step. Out: one JSON object a row,
"step" first; event files. The other sinks are the console and W&B. Sinks belong to the main process
alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vae_dist.config.errors import ConfigError
from vae_dist.files import write_durably
from vae_dist.tracking.metrics import Value

Row = dict[str, Any]
LONGEST_ROW = 2**22  # bytes that are read as one: a log may come from anywhere


class Sink(Protocol):
    """What cannot be written raises OSError, which costs a warning; all else ends the run."""

    def log(self, step: int, row: Mapping[str, Value]) -> None: ...

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None: ...

    def close(self, status: str) -> None:
        """`status` is finished, interrupted or failed. Closing twice does no harm."""
        ...


class JsonlSink:
    """Appends each row to `path`, unbuffered, so that a kill loses none.

    At open, rows past `resume_step` and a torn last line are cut, so that a resumed run has each
    row once. A row of the step of the last one (an evaluation after a resume) joins it. NaN and
    infinities are written as null. What a full disk does not take is kept and written later.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int) -> None:
        self._path = Path(path)
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= resume_step]
        if kept != lines:
            write_durably(self._path, kept)
        self._last_step = _step(kept[-1]) if kept else -1
        self._file = self._path.open("ab", buffering=0)
        self._pending = b""  # rows, the first perhaps without its beginning

    def log(self, step: int, row: Mapping[str, Value]) -> None:
        values = {"step": step} | {key: _finite(value) for key, value in row.items()}
        if step == self._last_step and not self._pending:
            *lines, last = self._path.read_bytes().splitlines(keepends=True)
            # Replaces the file, so that a kill leaves the old row or the joined one.
            write_durably(self._path, [*lines, _line(json.loads(last) | values)])
            self._file.close()
            self._file = self._path.open("ab", buffering=0)
        else:
            self._last_step = step
            self._pending += _line(values)
            self._write_pending()

    def _write_pending(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        """The PNG file is its own record."""

    def close(self, status: str) -> None:
        if self._file.closed:
            return
        try:
            self._write_pending()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


class TensorBoardSink:
    """Event files in `folder`. Points past `resume_step`, of an earlier session, are hidden by
    TensorBoard itself. Raises ConfigError where the package tensorboard is missing."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "log.tensorboard=true needs the package tensorboard: "
                "pip install 'vae_dist[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(self, step: int, row: Mapping[str, Value]) -> None:
        for key, value in row.items():
            if not isinstance(value, list):
                self._writer.add_scalar(key, value, step)
            elif (np.abs(value) < 1e20).any():  # TensorBoard's largest bin; an empty one raises
                self._writer.add_histogram(key, np.asarray(value), step)

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        pixels = np.asarray(Image.open(png_path).convert("RGB"))
        self._writer.add_image(key, pixels, step, dataformats="HWC")

    def close(self, status: str) -> None:
        self._writer.close()


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(step, row without "step") of each whole line, also while the run goes on.

    A value that was no number is None. Lines that are no rows are passed over, as is what is no
    plain file.
    """
    if path.is_file():
        with path.open("rb") as lines:
            while line := lines.readline(LONGEST_ROW):
                if row := _row(line):
                    yield row.pop("step"), row


def _finite(value: Value) -> Any:
    if isinstance(value, list):
        return [float(f"{item:.5g}") if math.isfinite(item) else None for item in value]
    return value if math.isfinite(value) else None


def _line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _row(line: bytes) -> Row:
    """Empty for what is no row. JSON has no NaN and infinities, but Python's writers have."""
    try:
        row = json.loads(line, parse_constant=lambda constant: None)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}


def _step(line: bytes) -> float:
    """Of a row; infinity of what is none."""
    return _row(line).get("step", math.inf)
