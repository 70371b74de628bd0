"""What a W&B run holds already, so that a run that goes on sends each point once.

In: what the server says of the run at a resume, or the parts of the run under its folder's
`wandb/`. Out: `Recorded`, which answers for each row and picture of a step whether it is there.

Every record that the trainer sends names its kind: ROW, or the key of a picture. A kind's steps
ascend, so one number tells what the server has of it. Summaries run ahead of the history by up to
one record, at the server and in a killed run's file (measured with wandb 0.31), so the history is
what counts.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vae_dist.tracking.images import find_images, image_caption
from vae_dist.tracking.sinks import read_rows

STEP_KEY = "trainer/step"
KIND_KEY = "trainer/record"
ROW = "row"

_STEP_OF = "trainer/step_of/"
_READER = (sys.executable, "-m", "wandb", "leet", "inspect", "--json")
_READ_SECONDS = 300.0
_LATE_SECONDS = 600.0
# What wandb-core itself asks for, and does not hand on.
_LAST_RECORD = """
query LastRecord($entity: String, $project: String, $name: String!) {
    model(name: $project, entityName: $entity) {
        bucket(name: $name, missingOk: true) { historyTail }
    }
}
"""
_STOPPED = """
query Stopped($entity: String, $project: String, $name: String!) {
    project(name: $project, entityName: $entity) {
        run(name: $name) { stopped }
    }
}
"""


class Record(NamedTuple):
    """What is sent at once: a row, or one picture."""

    step: int
    kind: str  # ROW, or the key of a picture
    values: Mapping[str, Any]


class Picture(NamedTuple):
    path: Path
    caption: str


def records_on_disk(log_path: Path, images: Path, *, up_to: int) -> Iterator[Record]:
    """The rows of log.jsonl and the picture files of a run, of the steps up to `up_to`; by step, so
    that the last one that arrives tells of all before it."""
    rows = {step: row for step, row in read_rows(log_path) if step <= up_to}
    records = [Record(step, ROW, row) for step, row in rows.items()]
    for name, paths in find_images(images).items():
        key = f"images/{name}"
        for step, path in paths.items():
            if step <= up_to:
                picture = Picture(path, image_caption(step, rows.get(step, {})))
                records.append(Record(step, key, {key: picture}))
    yield from sorted(records, key=lambda record: record.step)


def address(step: int, kind: str) -> dict[str, Any]:
    """What a record of this kind and step carries beside its values."""
    where = {STEP_KEY: step, KIND_KEY: kind}
    return where if kind == ROW else where | {_STEP_OF + kind: step}


class Recorded:
    """Rows and pictures that a W&B run holds: all up to a step, or a set of steps, per kind."""

    def __init__(self) -> None:
        self._floors: dict[str, int] = {}
        self._steps: dict[str, set[int]] = {}

    def has(self, step: int, kind: str) -> bool:
        return step <= self._floors.get(kind, -1) or step in self._steps.get(kind, ())

    def add(self, step: int, kind: str) -> None:
        self._steps.setdefault(kind, set()).add(step)

    def add_server(self, summary: Mapping[str, Any], last: Mapping[str, Any] | None) -> None:
        """`summary` has the last value of every key, `last` is the last record of the history."""
        if STEP_KEY not in summary:
            return
        self._raise(ROW, int(summary[STEP_KEY]))
        for key, step in summary.items():
            if key.startswith(_STEP_OF):
                self._raise(key.removeprefix(_STEP_OF), int(step))
        ahead = _address_of(summary)
        if last is not None and _address_of(last) != ahead:
            step, kind = ahead
            self._floors[kind] = step - 1

    def add_part(self, part: Path) -> bool:
        """The history in a part's file, seconds each; False when it cannot be read."""
        try:
            for record in _history(part):
                self.add(*_address_of(record))
        except (OSError, subprocess.SubprocessError, LookupError, ValueError, TypeError):
            return False
        return True

    def _raise(self, kind: str, step: int) -> None:
        self._floors[kind] = max(self._floors.get(kind, -1), step)


def _address_of(record: Mapping[str, Any]) -> tuple[int, str]:
    return int(record.get(STEP_KEY, -1)), str(record.get(KIND_KEY, ROW))


def last_record(wandb: Any, run: Any) -> dict[str, Any] | None:
    """The last record in the server's history of `run`, empty where there is none; None without an
    answer."""
    try:
        answer = _ask(wandb, run, _LAST_RECORD)
        lines = json.loads(answer["model"]["bucket"]["historyTail"])
        return dict(json.loads(lines[-1])) if lines else {}
    except Exception:  # of the service, of its client, or an answer of another form
        return None


def was_stopped(wandb: Any, run: Any) -> bool:
    """Whether the server wants `run` to end: by its stop button, or as its sweep decided."""
    try:
        return bool(_ask(wandb, run, _STOPPED, seconds=3.0)["project"]["run"]["stopped"])
    except Exception:  # as above
        return False


def _ask(wandb: Any, run: Any, query: str, *, seconds: float = 10.0) -> dict[str, Any]:
    variables = {"entity": run.entity, "project": run.project, "name": run.id}
    service = wandb.Api(timeout=int(seconds))._service_api
    return dict(service.execute_graphql(query, variables=variables, timeout=seconds))


def find_parts(folder: Path, run_id: str) -> list[Path]:
    """The parts of a run, one per session, oldest first."""
    found = [
        path
        for pattern in ("run-*", "offline-run-*")
        for path in (folder / "wandb").glob(f"{pattern}-{run_id}")
    ]
    return sorted(found, key=lambda path: path.name.removeprefix("offline-"))


def late_media(part: Path) -> list[Path]:
    """Pictures of the last minutes of a part: a killed uploader may have sent the record of one and
    not its file. They lie under `part`/files."""
    times = {path: path.stat().st_mtime for path in (part / "files" / "media").rglob("*.png")}
    newest = max(times.values(), default=0.0)
    return sorted(path for path, written in times.items() if written > newest - _LATE_SECONDS)


def is_offline(part: Path) -> bool:
    return part.name.startswith("offline-")


def mark_synced(part: Path) -> None:
    """`wandb sync` passes over a part with this mark of its own: the server has these points."""
    for file in part.glob("*.wandb"):
        with contextlib.suppress(OSError):
            file.with_suffix(".wandb.synced").touch()


def _history(part: Path) -> Iterator[dict[str, Any]]:
    """The history records of a part, read with W&B's own command, which also reads the torn file of
    a killed run as far as `wandb sync` does."""
    nothing = subprocess.DEVNULL
    with subprocess.Popen(
        [*_READER, str(part)], stdin=nothing, stdout=subprocess.PIPE, stderr=nothing
    ) as reader:
        assert reader.stdout is not None
        limit = threading.Timer(_READ_SECONDS, reader.kill)
        limit.start()
        try:
            for line in reader.stdout:
                record = json.loads(line)
                if record.get("type") == "history":
                    item = record["history"]["item"]
                    if STEP_KEY in item:
                        yield item
            if code := reader.wait():
                raise subprocess.SubprocessError(f"exit code {code}")
        finally:
            limit.cancel()
            reader.kill()


def has_upload_errors(part: Path) -> bool:
    """Whether the uploader gave something up; it ends without a word where it is refused (403)."""
    try:
        log = (part / "logs" / "debug-internal.log").read_text(errors="replace")
    except OSError:
        return False
    errors = [line for line in log.splitlines() if '"level":"ERROR' in line]
    return any(place in line for line in errors for place in ("filestream:", "runfiles:"))
