"""log.jsonl over resumes, kills and full disks."""

from __future__ import annotations

import contextlib
import json
import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vae_dist.tracking.sinks import JsonlSink, read_rows


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, steps: range) -> None:
    sink = JsonlSink(path, resume_step=0)
    for step in steps:
        sink.log(step, {"train/loss": step / 2})
    sink.close("interrupted")


def test_resume_cuts_later_rows_and_lines_that_are_no_row(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(1, 8))
    inode = path.stat().st_ino
    JsonlSink(path, resume_step=7).close("finished")
    assert path.stat().st_ino == inode  # a clean log is not rewritten
    with path.open("ab") as file:
        file.write(b"\0\0\xff\0\n[1]\n{}\n" + b"[" * 10**5 + b'\n{"step": 3, "train/lo')
    sink = JsonlSink(path, resume_step=4)
    sink.log(5, {"train/loss": math.nan, "optim/grad_norm": math.inf, "optim/lr": 0.1})
    for _ in range(2):
        sink.close("finished")
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5]
    last = '{"step": 5, "train/loss": null, "optim/grad_norm": null, "optim/lr": 0.1}\n'
    assert path.read_text().endswith("\n" + last)


def test_what_is_made_up_after_a_resume_joins_the_row_of_its_step(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(1, 5))
    for _ in range(2):  # killed before the checkpoint that follows, it is made up again
        sink = JsonlSink(path, resume_step=3)
        sink.log(3, {"eval/loss": 0.5, "eval/best": math.nan})
        sink.log(4, {"loss": 9.0})
        sink.close("interrupted")
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4]
    assert rows(path)[2] == {"step": 3, "train/loss": 1.5, "eval/loss": 0.5, "eval/best": None}


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond the limit, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("stays_full", [False, True])
def test_rows_wait_for_a_full_disk_and_come_in_order(tmp_path: Path, stays_full: bool) -> None:
    path = tmp_path / "log.jsonl"
    sink = JsonlSink(path, resume_step=0)
    with files_of_at_most(100):  # a row has some 30 bytes
        for step in range(1, 501):  # more than the buffer of a file holds
            with contextlib.suppress(OSError):
                sink.log(step, {"train/loss": step / 2})
        assert path.stat().st_size == 100  # the last row is torn
        if stays_full:
            with pytest.raises(OSError):
                sink.close("finished")
    if not stays_full:
        sink.log(501, {"train/loss": 5.5})
    sink.close("finished")
    JsonlSink(path, resume_step=999).close("finished")
    assert [row["step"] for row in rows(path)] == list(range(1, 4 if stays_full else 502))


def test_whole_rows_of_a_log_that_is_being_written(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert list(read_rows(log)) == list(read_rows(Path("/dev/zero"))) == []
    log.write_text('{"step": 1, "a": 2}\n[3]\n{"a": 1}\n{"step": 2, "a": NaN}\n{"step": 3, "a"')
    assert list(read_rows(log)) == [(1, {"a": 2}), (2, {"a": None})]
