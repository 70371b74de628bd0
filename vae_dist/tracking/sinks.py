"""Where metrics and pictures go: one small protocol, and `log.jsonl`, the record of a run.

In: rows {"group/name": value} and PNG files, each at an optimizer step. Out: one JSON object a
row, "step" first. The other sinks are the console, W&B and TensorBoard. Sinks belong to the main
process alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from vae_dist.files import write_durably
from vae_dist.tracking.metrics import Value

Row = dict[str, Any]


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
        self._last_step = _keep_rows_up_to(self._path, resume_step)
        self._file = self._path.open("ab", buffering=0)
        self._pending = b""  # rows, the first perhaps without its beginning

    def log(self, step: int, row: Mapping[str, Value]) -> None:
        values = {key: _finite(value) for key, value in row.items()}
        if step == self._last_step and not self._pending:
            self._join_last(values)
            return
        self._last_step = step
        self._pending += _line({"step": step, **values})
        self._write_pending()

    def _join_last(self, values: Row) -> None:
        """Replaces the file, so that a kill leaves the old row or the joined one."""
        *lines, last = self._path.read_bytes().splitlines(keepends=True)
        write_durably(self._path, b"".join([*lines, _line(json.loads(last) | values)]))
        self._file.close()
        self._file = self._path.open("ab", buffering=0)

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


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(step, row without "step") of each whole line, also while the run goes on.

    A value that was no number is None. Lines that are no rows are passed over.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if row := _row(line):
                yield row.pop("step"), row


def _finite(value: Value) -> Any:
    if isinstance(value, list):
        return [float(f"{item:.5g}") if math.isfinite(item) else None for item in value]
    return value if math.isfinite(value) else None


def _line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _row(line: str) -> Row | None:
    """None for what is no row. JSON has no NaN and infinities, but Python's writers have."""
    try:
        row = json.loads(line, parse_constant=lambda constant: None)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _keep_rows_up_to(path: Path, step: int) -> int:
    """Rewrite the log without later rows and torn lines; leave a clean one alone.

    Returns the step of the last row, -1 where there is none.
    """
    if not path.exists():
        return -1
    kept, last_step = [], -1
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for line in lines:
        row = _row(line) if line.endswith("\n") else None
        if row and row["step"] <= step:
            kept.append(line)
            last_step = row["step"]
    if kept != lines:
        write_durably(path, "".join(kept).encode())
    return last_step
