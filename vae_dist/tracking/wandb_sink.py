"""A W&B run that cannot block or stop training.

What goes in: the rows and PNG files of a run. What comes out: a W&B run, online when the user is
logged in and the server answers, else offline under the run folder with one line that shows how to
upload it. Every call into wandb during training happens on one worker thread behind a bounded
queue: what a full queue does not take is sent later, from log.jsonl and the pictures, a dead or
hanging wandb-core ends tracking, and training goes on.

Only `mode=online`, asked for by name, is a promise: where it cannot be kept, ConfigError at start.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import flatten
from vae_dist.config.schema import TrainConfig
from vae_dist.tracking.metrics import Value
from vae_dist.tracking.wandb_modes import (
    asked_mode,
    first_line,
    obstacle_to_online,
    run_id_of,
)
from vae_dist.tracking.wandb_record import (
    KIND_KEY,
    ROW,
    STEP_KEY,
    Picture,
    Record,
    Recorded,
    address,
    find_parts,
    has_upload_errors,
    is_offline,
    last_record,
    late_media,
    mark_synced,
    records_on_disk,
    was_stopped,
)

_INIT_SECONDS = 30.0
_QUEUED_RECORDS = 4096
# How long close() may wait. An interrupted run has a deadline of its scheduler to meet, and what
# has not been sent is on disk; an offline run only has to write what is queued.
_CLOSE_INTERRUPTED_SECONDS = 10.0
_CLOSE_OFFLINE_SECONDS = 30.0
# Part of that time after which wandb itself gives up and writes the rest to disk.
_GIVE_UP = 0.8


class _Backfill(NamedTuple):
    log_path: Path
    images: Path
    up_to: int


class _Artifact(NamedTuple):
    name: str
    kind: str
    paths: tuple[Path, ...]


_Task = Record | _Backfill | _Artifact


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
        self._folder = folder
        self._name = folder.resolve().name
        self._on_stop = on_stop
        self._environment = dict(environment or {})
        self._close_seconds = float(config.wandb.finish_timeout_s)
        self._run: Any = None
        self._wandb: Any = None
        self._sync_dir = ""
        self._broken = False
        self._closed = False
        self._is_incomplete = False
        self._queueing = threading.Lock()  # rows and pictures come from two threads
        self._left_on_disk = -1  # the last step of which a full queue did not take something
        self._was_slow = False
        self._stop_requested = threading.Event()
        self._recorded = Recorded()  # from before an interruption, and sent since
        self._earlier: list[Path] = []  # parts of this W&B run, from before
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
            say(f"W&B is offline{because}; upload this run with: {self._how_to_upload()}")
        self._queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="wandb-rows", daemon=True)
        self._worker.start()

    @property
    def stop_requested(self) -> bool:
        """Whether somebody pressed "Stop run" in the W&B page."""
        return self._stop_requested.is_set()

    @property
    def lacks_points(self) -> bool:
        """After close(): whether W&B did not get everything, as far as can be seen from here."""
        return self._is_incomplete or self._broken

    @property
    def run_id(self) -> str:
        return str(self._run.id) if self._run is not None else ""

    @property
    def url(self) -> str:
        """The page of the run; "" where there is none."""
        return str(self._run.url or "") if self._run is not None else ""

    def log(self, step: int, row: Mapping[str, Value]) -> None:
        """The row is in log.jsonl already, and an image in `images`: a slow W&B gets them there."""
        self._put_record(Record(step, ROW, row))

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        self._put_record(Record(step, key, {key: Picture(Path(png_path), caption)}))

    def backfill(self, log_path: Path, images: Path, *, up_to: int) -> None:
        """Send what the W&B run lacks of the steps up to `up_to`, from log.jsonl and `images`.

        A killed trainer takes the newest rows with it; a run that began offline may go on online.
        """
        self._put(_Backfill(log_path, images, up_to))

    def artifacts(self, checkpoint: Path, images: Path, *, step: int) -> None:
        """Upload the files of a checkpoint, and the pictures of its step, as W&B artifacts."""
        weights, pictures = sorted(checkpoint.iterdir()), sorted(images.glob(f"*_{step:08d}.png"))
        for name, kind, paths in (
            ("checkpoint", "model", weights),
            ("pictures", "pictures", pictures),
        ):
            self._put(_Artifact(f"{self._name}-{name}", kind, tuple(paths)))

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
        is_preempted = (
            status == "interrupted"
            and self.mode == "online"
            and "WANDB_SWEEP_ID" in os.environ
            and not self.stop_requested  # a trial that its sweep ends is not to go on
        )
        closer = threading.Thread(
            target=self._finish, args=(0 if status == "finished" else 1, is_preempted), daemon=True
        )
        closer.start()
        deadline = time.monotonic() + seconds
        while closer.is_alive() and time.monotonic() < deadline and not self._broken:
            closer.join(0.05)
        if closer.is_alive() or self._broken:
            self._abandon()
        if self._broken or self._is_incomplete:
            self._say(f"W&B did not get everything; upload the rest with: {self._how_to_upload()}")
            return
        if self.mode == "online":
            for part in self._earlier:
                if is_offline(part):
                    mark_synced(part)

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
            "finish_timeout": _GIVE_UP * self._close_seconds,
            "finish_timeout_raises": True,
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
                self._run.define_metric(KIND_KEY, hidden=True)
                self._run.define_metric("*", step_metric=STEP_KEY)
                self._sync_dir = str(self._run.settings.sync_dir)
                own = Path(self._sync_dir).resolve()
                parts = find_parts(folder, run_id) if is_resumed else []
                self._earlier = [part for part in parts if part.resolve() != own]
                if mode == "online" and self._run.resumed:
                    last = last_record(wandb, self._run)
                    self._recorded.add_server(dict(self._run.summary), last)
            except Exception as error:  # CommError, UsageError, ConnectionResetError, OSError, ...
                self._run = None
                obstacle = f"W&B could not start a run ({first_line(error)})"
                continue
            self._wandb = wandb
            self.mode = mode
            break
        return obstacle

    def _how_to_upload(self) -> str:
        """A command; `wandb sync` sends a part from its beginning, also what has arrived before."""
        if self.mode == "online" or not all(map(is_offline, self._earlier)):
            return f"python -m vae_dist.upload run={self._folder}"
        # one after the other: parts of a run that are sent at once take each other's places
        return " && ".join(f"wandb sync {part}" for part in (*self._earlier, self._sync_dir))

    # --- the worker ---

    def _put(self, task: _Task) -> None:
        if self._is_open():
            self._queue.put(task)

    def _put_record(self, record: Record) -> None:
        """Queue it, unless W&B is too slow; then the disk keeps it until half the queue is sent."""
        if not self._is_open():
            return
        with self._queueing:
            num_queued = self._queue.qsize()
            if self._left_on_disk < 0 and num_queued < _QUEUED_RECORDS:
                self._queue.put(record)
                return
            self._left_on_disk = max(self._left_on_disk, record.step)
            if num_queued <= _QUEUED_RECORDS // 2:
                self._take_from_disk()
        if not self._was_slow:
            self._was_slow = True
            self._say("W&B does not take rows fast enough and gets some later; training goes on.")

    def _take_from_disk(self) -> None:
        if self._left_on_disk >= 0:
            log_path, images = self._folder / "log.jsonl", self._folder / "images"
            self._queue.put(_Backfill(log_path, images, self._left_on_disk))
            self._left_on_disk = -1

    def _is_open(self) -> bool:
        return self._run is not None and not self._broken and not self._closed

    def _work(self) -> None:
        if self.mode == "offline":
            for part in self._earlier:
                if not self._recorded.add_part(part):
                    self._say(f"warning: cannot read {part}; its points may come twice to W&B")
        else:
            for part in [part for part in self._earlier if not is_offline(part)][-1:]:
                self._send_late_media(part)
        while (task := self._queue.get()) is not None:
            if self._broken:
                continue
            try:
                if isinstance(task, _Artifact):
                    self._upload(task)
                elif isinstance(task, _Backfill):
                    for record in records_on_disk(task.log_path, task.images, up_to=task.up_to):
                        self._send(record)
                else:
                    self._send(task)
            except Exception as error:  # wandb raises builtin and own errors of many kinds
                self._break(error)

    def _send_late_media(self, part: Path) -> None:
        try:
            for path in late_media(part):
                self._run.save(str(path), base_path=str(part / "files"), policy="now")
        except Exception as error:  # as in _work
            self._say(f"warning: W&B may lack pictures of {part} ({first_line(error)})")

    def _send(self, record: Record) -> None:
        step, kind, values = record
        if not self._recorded.has(step, kind):
            known = {key: self._value(value) for key, value in values.items()}
            known = {key: value for key, value in known.items() if value is not None}
            self._run.log(address(step, kind) | known, commit=True)
            self._recorded.add(step, kind)

    def _value(self, value: Any) -> Any:
        if isinstance(value, Picture):
            return self._wandb.Image(str(value.path), caption=value.caption)
        if isinstance(value, list):  # of a distribution; wandb takes finite numbers alone
            numbers = [item for item in value if item is not None and math.isfinite(item)]
            return self._wandb.Histogram(numbers) if numbers else None
        return value

    def _upload(self, asked: _Artifact) -> None:
        artifact = self._wandb.Artifact(asked.name, type=asked.kind)
        for path in asked.paths:
            artifact.add_file(str(path), name=path.name)
        self._run.log_artifact(artifact)

    def _finish(self, exit_code: int, is_preempted: bool) -> None:
        try:
            with self._queueing:
                self._take_from_disk()
                self._queue.put(None)
            self._worker.join()
            if self._broken:
                return
            if is_preempted and not was_stopped(self._wandb, self._run):
                self._run.mark_preempting()  # the sweep gives this trial to another agent
            try:
                self._run.finish(exit_code=exit_code)
            except TimeoutError:
                self._is_incomplete = True
            # finish() may return before wandb-core has written the last rows; teardown waits.
            self._wandb.teardown(exit_code)
            self._is_incomplete |= self.mode == "online" and has_upload_errors(Path(self._sync_dir))
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
