"""A W&B run that cannot block or stop training.

What goes in: the rows and PNG files of a run. What comes out: a W&B run, online when the user is
logged in and the server answers, else offline under the run folder with one line that shows how to
upload it. Every call into wandb during training happens on one worker thread behind a bounded
queue: a full queue drops rows, a dead or hanging wandb-core ends tracking, and training goes on.

Only `mode=online`, asked for by name, is a promise: where it cannot be kept, ConfigError at start.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import flatten
from vae_dist.config.schema import TrainConfig
from vae_dist.tracking.history import find_pictures, picture_caption, read_rows
from vae_dist.tracking.metrics import Value
from vae_dist.tracking.wandb_modes import (
    asked_mode,
    first_line,
    obstacle_to_online,
    offline_summaries,
    run_id_of,
)

STEP_KEY = "trainer/step"

_INIT_SECONDS = 30.0
_QUEUED_ROWS = 4096
# How long close() may wait. An interrupted run has a deadline of its scheduler to meet, and what
# has not been sent is on disk; an offline run only has to write what is queued.
_CLOSE_INTERRUPTED_SECONDS = 10.0
_CLOSE_OFFLINE_SECONDS = 10.0


class _Picture(NamedTuple):
    path: Path
    caption: str


class _Backfill(NamedTuple):
    log_path: Path
    images: Path
    up_to: int


class _Artifact(NamedTuple):
    name: str
    kind: str
    paths: tuple[Path, ...]


def _step_of(key: str) -> str:
    """The key that holds the step of the last picture `key`: what a resumed run asks for."""
    return f"trainer/step_of/{key}"


class WandbSink:
    """Sink for the main process; `mode` tells what came of it: online, offline or disabled.

    `folder` is the run folder: it gets `wandb/` and `wandb_id`, the run id by which a resumed run
    goes on in the same W&B run. `say` prints a line to the user, also from the worker thread.
    `on_stop` is called, from a thread of wandb's, when somebody presses "Stop run" in the W&B page.
    `environment` goes into the W&B config beside the keys of `config`. Raises ConfigError when
    online was asked for (wandb.mode or WANDB_MODE, which wins) and cannot be had.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        *,
        resume_step: int = 0,
        say: Callable[[str], None] = print,
        on_stop: Callable[[], None] = lambda: None,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        self._say = say
        self._name = folder.resolve().name
        self._on_stop = on_stop
        self._environment = dict(environment or {})
        self._close_seconds = float(config.wandb.finish_timeout_s)
        self._run: Any = None
        self._wandb: Any = None
        self._sync_dir = ""
        self._broken = False
        self._closed = False
        self._num_dropped = 0
        self._stop_requested = threading.Event()
        # Rows up to here are recorded already, from before an interruption; so are pictures.
        self._floor = -1
        self._image_floor: dict[str, int] = {}
        self.mode = "disabled"
        asked, source = asked_mode(config.wandb.mode)
        if asked == "disabled":
            return
        obstacle = self._start(config, folder, asked, resume_step)
        if self.mode != "online" and asked == "online":
            raise ConfigError(
                f"{source}=online but {obstacle}; mend that, or set wandb.mode=offline or auto"
            )
        if self.mode == "disabled":
            say(f"W&B is off: {obstacle}. Training goes on; log.jsonl has every metric.")
            return
        if self.mode == "offline":
            because = "" if asked == "offline" else f": {obstacle}"
            say(f"W&B is offline{because}; upload this run with: wandb sync {self._sync_dir}")
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUED_ROWS)
        self._worker = threading.Thread(target=self._work, name="wandb-rows", daemon=True)
        self._worker.start()

    @property
    def stop_requested(self) -> bool:
        """Whether somebody pressed "Stop run" in the W&B page."""
        return self._stop_requested.is_set()

    def log(self, step: int, row: Mapping[str, Value]) -> None:
        if step > self._floor:
            self._put({STEP_KEY: step, **row})

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        if step > self._image_floor.get(key, -1):
            picture = _Picture(Path(png_path), caption)
            self._put({STEP_KEY: step, _step_of(key): step, key: picture})

    def backfill(self, log_path: Path, images: Path, *, up_to: int) -> None:
        """Send what the W&B run lacks of the steps up to `up_to`, from log.jsonl and `images`.

        A killed trainer takes the newest rows with it; a run that began offline may go on online.
        """
        self._put({"": _Backfill(log_path, images, up_to)})

    def artifacts(self, checkpoint: Path, images: Path, *, step: int) -> None:
        """Upload the files of a checkpoint, and the pictures of its step, as W&B artifacts."""
        weights, pictures = sorted(checkpoint.iterdir()), sorted(images.glob(f"*_{step:08d}.png"))
        for name, kind, paths in (
            ("checkpoint", "model", weights),
            ("pictures", "pictures", pictures),
        ):
            self._put({"": _Artifact(f"{self._name}-{name}", kind, tuple(paths))})

    def close(self, status: str) -> None:
        """Flush and end the W&B run in bounded time; what could not be sent stays on disk."""
        if self._run is None or self._closed:
            return
        self._closed = True
        seconds = self._close_seconds
        if status == "interrupted":
            seconds = min(seconds, _CLOSE_INTERRUPTED_SECONDS)
        if self.mode == "offline":
            seconds = min(seconds, _CLOSE_OFFLINE_SECONDS)
        closer = threading.Thread(
            target=self._finish, args=(0 if status == "finished" else 1,), daemon=True
        )
        closer.start()
        deadline = time.monotonic() + seconds
        while closer.is_alive() and time.monotonic() < deadline and not self._broken:
            closer.join(0.05)
        if closer.is_alive() or self._broken:
            self._abandon()
            online = "--include-online " if self.mode == "online" else ""
            self._say(
                "W&B did not finish cleanly; upload what it has with: "
                f"wandb sync {online}{self._sync_dir}"
            )
        elif self._num_dropped:
            self._say(f"W&B missed {self._num_dropped} rows; log.jsonl has them all.")

    # --- start ---

    def _start(self, config: TrainConfig, folder: Path, asked: str, resume_step: int) -> str:
        """Set `_run` and `mode`; the reason why `mode` is not online, or ""."""
        # Error reports go to W&B's servers also offline, and delay the exit where nothing answers.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            # wandb turns to /tmp without a word when it cannot write, so it is tried out here.
            (folder / "wandb").mkdir(parents=True, exist_ok=True)
            run_id, is_resumed = run_id_of(folder, resume_step)
        except OSError as error:
            return f"{folder} cannot be written ({error.strerror})"
        try:
            import wandb
        except Exception as error:  # a broken installation shows as almost any exception
            return f"wandb cannot be imported ({first_line(error)})"
        obstacle = "" if asked == "offline" else obstacle_to_online(wandb, asked)
        modes: list[Any] = ["online"] if asked == "online" else ["online", "offline"]
        if asked == "offline" or (asked == "auto" and obstacle):
            modes = ["offline"]
        elif obstacle:
            return obstacle
        requested, on_stop = self._stop_requested, self._on_stop

        def stop() -> None:
            requested.set()
            on_stop()

        settings: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "init_timeout": _INIT_SECONDS,
            "finish_timeout": self._close_seconds,
            "stop_fn": stop,  # settings are deep-copied: a function is, a bound method is not
        }
        known = {key: settings[key] for key in settings if key in wandb.Settings.model_fields}
        for mode in modes:
            try:
                self._run = wandb.init(
                    mode=mode,
                    id=run_id,
                    resume="allow" if is_resumed else None,
                    dir=str(folder),
                    project=config.wandb.project,
                    entity=config.wandb.entity,
                    group=config.wandb.group,
                    tags=list(config.wandb.tags),
                    name=self._name,
                    config=flatten(config) | {"environment": self._environment},
                    settings=wandb.Settings(**known),
                )
                self._run.define_metric(STEP_KEY, hidden=True)
                self._run.define_metric("*", step_metric=STEP_KEY)
                if mode == "online" and self._run.resumed:
                    self._set_floors(dict(self._run.summary))
                elif is_resumed:
                    for summary in offline_summaries(folder, run_id):
                        self._set_floors(summary)
                self._sync_dir = str(self._run.settings.sync_dir)
            except Exception as error:  # CommError, UsageError, ConnectionResetError, OSError, ...
                self._run = None
                obstacle = f"W&B could not start a run ({first_line(error)})"
                continue
            self._wandb = wandb
            self.mode = mode
            break
        return obstacle

    def _set_floors(self, summary: Mapping[str, Any]) -> None:
        """`summary`: the last value of every key that this W&B run has already."""
        self._floor = max(self._floor, int(summary.get(STEP_KEY, -1)))
        start = _step_of("")
        for name, step in summary.items():
            if name.startswith(start):
                key = name.removeprefix(start)
                self._image_floor[key] = max(self._image_floor.get(key, -1), int(step))

    # --- the worker ---

    def _put(self, row: dict[str, Any]) -> None:
        if self._run is None or self._broken or self._closed:
            return
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._num_dropped += 1
            if self._num_dropped == 1:
                self._say("W&B does not take rows fast enough and misses some; training goes on.")

    def _work(self) -> None:
        while (row := self._queue.get()) is not None:
            if self._broken:
                continue
            try:
                if isinstance(task := row.get(""), _Artifact):
                    self._upload(task)
                elif isinstance(task, _Backfill):
                    for missing in self._missing(task):
                        self._send(missing)
                else:
                    self._send(row)
            except Exception as error:  # wandb raises builtin and own errors of many kinds
                self._break(error)

    def _send(self, row: Mapping[str, Any]) -> None:
        self._run.log({key: self._value(value) for key, value in row.items()}, commit=True)

    def _missing(self, task: _Backfill) -> Iterator[dict[str, Any]]:
        rows = {}
        for step, row in read_rows(task.log_path):
            rows[step] = row
            if self._floor < step <= task.up_to:
                known = {key: value for key, value in row.items() if value is not None}
                yield {STEP_KEY: step, **known}
        for name, paths in find_pictures(task.images).items():
            key = f"images/{name}"
            for step, path in paths.items():
                if self._image_floor.get(key, -1) < step <= task.up_to:
                    picture = _Picture(path, picture_caption(step, rows.get(step, {})))
                    yield {STEP_KEY: step, _step_of(key): step, key: picture}

    def _value(self, value: Any) -> Any:
        if isinstance(value, _Picture):
            return self._wandb.Image(str(value.path), caption=value.caption)
        if isinstance(value, list):  # of a distribution
            return self._wandb.Histogram(value)
        return value

    def _upload(self, asked: _Artifact) -> None:
        artifact = self._wandb.Artifact(asked.name, type=asked.kind)
        for path in asked.paths:
            artifact.add_file(str(path), name=path.name)
        self._run.log_artifact(artifact)

    def _finish(self, exit_code: int) -> None:
        try:
            self._queue.put(None)
            self._worker.join()
            if not self._broken:
                self._run.finish(exit_code=exit_code)
                # finish() may return before wandb-core has written the last rows; teardown waits.
                self._wandb.teardown(exit_code)
        except Exception as error:  # as in _work
            self._break(error)

    def _break(self, error: Exception) -> None:
        if not self._broken:
            self._broken = True
            self._say(
                f"W&B stopped working ({first_line(error)}); training goes on without it and"
                " log.jsonl has every metric."
            )

    def _abandon(self) -> None:
        """Kill the wandb-core that this process started: wandb's exit hook would wait for it."""
        import psutil

        self._broken = True
        for child in psutil.Process().children():
            try:
                if child.name().startswith("wandb-core"):
                    child.kill()
            except psutil.Error:
                continue
        # Takes the exit hook away, which would print a traceback, and then misses the dead core.
        with contextlib.suppress(Exception, SystemExit):
            self._wandb.teardown()
