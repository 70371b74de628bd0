"""A W&B run that can neither block training nor end it.

In: the rows and PNG files of a run. Out: a W&B run, online when there is a login and the server
answers, else offline under the run folder. Every call into wandb during training happens on one
thread behind a bounded queue, and what wandb raises there ends tracking alone.

Each point arrives at least once, for `log.jsonl` and `images/` have them all. A resumed online run
sends what the server lacks of them; a resumed offline run writes all of them, so that its newest
part is the whole run. A row is a function of its step, so a point that comes twice is the same.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import flatten
from vae_dist.config.schema import TrainConfig
from vae_dist.files import redacted, write_durably
from vae_dist.tracking.images import find_images, image_caption
from vae_dist.tracking.metrics import WANDB_STEP, Value
from vae_dist.tracking.sinks import read_rows

_QUEUED_TASKS = 4096  # wandb-core takes a thousand a second
_IMAGES_SENT_AGAIN = 32  # a killed uploader may have sent their records and not their files
_INIT_SECONDS = 15.0
_INTERRUPTED_SECONDS = 10.0  # of close(): the scheduler kills the job soon
_GIVE_UP = 0.8  # part of the time for close() after which wandb itself leaves the rest on disk
_STOPPED = """query Stopped($entity: String, $project: String, $id: String!) {
    project(name: $project, entityName: $entity) { run(name: $id) { stopped } } }"""


class WandbSink:
    """`on_stop` is called when the user presses "Stop run" in the W&B page.

    `environment` goes into the W&B config beside the keys of `config`. Raises ConfigError where
    wandb.mode (or WANDB_MODE, which wins) is online and the run cannot be.
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
        self._config, self._folder, self._say, self._on_stop = config, folder, say, on_stop
        self._values = flatten(config) | {"environment": dict(environment or {})}
        self._dir = Path(os.environ.get("WANDB_DIR") or folder).expanduser()  # wandb/ lies in it
        self._run: Any = None
        self._stop_requested = self._is_broken = self._is_complete = False
        self._status = ""  # of close()
        self._first_step = 0  # the server has the rows before
        self.mode = "disabled"
        asked = os.environ.get("WANDB_MODE") or config.wandb.mode
        if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            asked = "disabled"
        if asked not in ("auto", "online", "offline", "disabled"):
            raise ConfigError(f"WANDB_MODE={asked} is none of online, offline, disabled; unset it")
        if asked == "disabled":
            return
        reason = self._start(asked, resume_step)
        if asked == "online" and self.mode != "online":
            raise ConfigError(
                f"wandb.mode=online (or WANDB_MODE) but {reason}; set offline or auto instead"
            )
        if self.mode == "disabled":
            say(f"W&B is off: {reason}. Training goes on; log.jsonl has every metric.")
            return
        self._upload = f"wandb sync {'--include-online ' * (self.mode == 'online')}{self._part}"
        if self.mode == "offline":
            say(f"W&B is offline{reason and ': ' + reason}; upload this run with: {self._upload}")
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(_QUEUED_TASKS)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        self._put(self._send_recorded, resume_step)

    def log(self, step: int, row: Mapping[str, Value]) -> None:
        if step >= self._first_step:
            self._put(self._send_row, step, row)

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        self._put(self._send_image, step, key, png_path, caption)

    def close(self, status: str) -> None:
        """End the W&B run in bounded time; what could not be sent stays on disk."""
        if self._run is None or self._status:
            return
        self._put(self._finish, status)
        self._status, seconds = status, float(self._config.wandb.finish_timeout_s)
        if status == "interrupted":
            seconds = min(seconds, _INTERRUPTED_SECONDS)
        end = time.monotonic() + seconds
        with contextlib.suppress(queue.Full):
            self._tasks.put(None, timeout=seconds)
        self._thread.join(max(0.0, end - time.monotonic()))
        if not self._is_complete:
            self._kill_core()
            self._say(f"W&B did not get everything; upload the rest with: {self._upload}")
        elif self.mode == "offline":  # this part has the points of the earlier ones, too
            for part in (self._dir / "wandb").glob(f"offline-run-*-{self._run.id}"):
                if part.name != self._part.name:
                    shutil.rmtree(part, ignore_errors=True)

    # start

    def _start(self, asked: str, resume_step: int) -> str:
        """Set `_run` and `mode`; returns the reason why the mode is not online."""
        # Error reports go to W&B's servers also offline, and delay the exit where none answers.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            # wandb writes to /tmp without a word where it cannot write here
            (self._dir / "wandb").mkdir(parents=True, exist_ok=True)
            run_id = _run_id(self._folder, resume_step)
            import wandb

            reason = "" if asked == "offline" else _no_login(wandb, asked)
        except Exception as error:  # malformed keys, a broken installation: errors of many kinds
            return f"W&B cannot be used with {self._folder} ({_first_line(error)})"
        self._wandb: Any = wandb
        may_be_online = asked != "offline" and not reason
        for mode in ["online"] * may_be_online + ["offline"] * (asked != "online"):
            try:
                self._run = self._init(mode, run_id)
            except Exception as error:  # CommError, UsageError, ConnectionResetError, OSError, ...
                reason = f"W&B could not start a run ({_first_line(error)})"
                wandb.teardown()  # else its service takes the run for one in use
            else:
                self.mode, self._part = mode, Path(self._run.settings.sync_dir)
                break
        return reason

    def _init(self, mode: Any, run_id: str) -> Any:
        asked = self._config.wandb
        project, default = os.environ.get("WANDB_PROJECT"), type(asked)().project

        def stop() -> None:
            self._stop_requested = True
            self._on_stop()

        run = self._wandb.init(
            mode=mode,
            id=run_id,
            resume="allow",
            dir=str(self._dir),
            project=project if project and asked.project == default else asked.project,
            entity=asked.entity,
            group=asked.group,
            tags=list(asked.tags) or None,  # None: those of WANDB_TAGS
            name=os.environ.get("WANDB_NAME") or self._folder.resolve().name,
            config=redacted(self._values),
            settings=self._wandb.Settings(
                silent=True,
                console="off",
                x_disable_meta=True,  # arguments and SLURM_JWT; `environment` says the rest
                init_timeout=_INIT_SECONDS,
                finish_timeout=_GIVE_UP * asked.finish_timeout_s,
                finish_timeout_raises=True,
                stop_fn=stop,  # settings are deep-copied: a function is not, a bound method is
            ),
        )
        run.define_metric(WANDB_STEP, hidden=True)
        run.define_metric("*", step_metric=WANDB_STEP)
        if mode == "online" and run.resumed:
            # The summary may be a record ahead of the history: its step is sent again.
            self._first_step = int(dict(run.summary).get(WANDB_STEP, 0))
        return run

    # the worker

    def _put(self, send: Callable[..., None], *given: Any) -> None:
        def task() -> None:
            try:
                if not self._is_broken:
                    send(*given)
            except Exception as error:  # wandb raises builtin and own errors of many kinds
                self._break(_first_line(error))

        if self._run is not None and not self._is_broken and not self._status:
            try:
                self._tasks.put_nowait(task)
            except queue.Full:
                self._break("it hangs")

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _send_recorded(self, up_to: int) -> None:
        """What log.jsonl and the images folder have and W&B has not."""
        rows = dict(read_rows(self._folder / "log.jsonl"))
        for step, row in rows.items():
            if self._first_step <= step <= up_to:
                self._send_row(step, row)
        found = find_images(self._folder / "images")
        images = sorted((step, name) for name, paths in found.items() for step in paths)
        num_known = sum(step < self._first_step for step, _ in images)
        for step, name in images[max(0, num_known - _IMAGES_SENT_AGAIN) :]:
            if step <= up_to:
                caption = image_caption(step, rows.get(step, {}))
                self._send_image(step, f"images/{name}", found[name][step], caption)

    def _send_row(self, step: int, row: Mapping[str, Any]) -> None:
        values: dict[str, Any] = {WANDB_STEP: step}
        for key, value in row.items():
            if isinstance(value, list):  # of a distribution; wandb takes finite numbers alone
                numbers = [item for item in value if item is not None and math.isfinite(item)]
                value = self._wandb.Histogram(numbers) if numbers else None
            if value is not None:
                values[key] = value
        self._run.log(values)

    def _send_image(self, step: int, key: str, path: Path, caption: str) -> None:
        self._run.log({WANDB_STEP: step, key: self._wandb.Image(str(path), caption=caption)})

    def _break(self, reason: str) -> None:
        self._is_broken = True
        self._say(
            f"W&B stopped working ({reason}); training goes on without it and log.jsonl has every "
            "metric."
        )

    # end

    def _finish(self, status: str) -> None:
        if status == "interrupted" and self._is_preempted_trial():
            self._run.mark_preempting()  # the sweep gives this trial to another agent
        exit_code, is_in_time = int(status != "finished"), True
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            is_in_time = False
        # finish() may return before wandb-core has written the last rows; teardown waits.
        self._wandb.teardown(exit_code)
        self._is_complete = is_in_time

    def _is_preempted_trial(self) -> bool:
        """Of a sweep; a trial that its sweep or the user has stopped is not to go on."""
        if self.mode != "online" or "WANDB_SWEEP_ID" not in os.environ or self._stop_requested:
            return False
        variables = {key: getattr(self._run, key) for key in ("entity", "project", "id")}
        try:
            service = self._wandb.Api(timeout=3)._service_api
            answer = service.execute_graphql(_STOPPED, variables=variables, timeout=3.0)
            return not answer["project"]["run"]["stopped"]
        except Exception:  # of the service, of its client, or an answer of another form
            return True

    def _kill_core(self) -> None:
        """Kill the wandb-core that this process started: wandb's exit hook would wait for it."""
        self._is_broken = True
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name().startswith("wandb-core"):
                    child.kill()
        # Takes the exit hook away, which would print a traceback, and then misses the dead core.
        with contextlib.suppress(Exception, SystemExit):
            self._wandb.teardown()


def _run_id(folder: Path, resume_step: int) -> str:
    """That of a sweep's agent, or that of the run that is resumed, or another."""
    path, given = folder / "wandb_id", os.environ.get("WANDB_RUN_ID", "")
    if not given and resume_step > 0 and path.exists():
        return path.read_text().strip()
    run_id = given or secrets.token_hex(4)
    write_durably(path, run_id.encode())
    return run_id


def _no_login(wandb: Any, asked: str) -> str:
    """Why no run is to be sent to W&B from here, as a clause; empty where one may."""
    mode = wandb.setup().settings.mode
    if asked == "auto" and mode in ("offline", "dryrun", "disabled"):
        return f"`wandb {mode}` is set here"
    has_login = wandb.login(prompt=False, verify=False)
    return "" if has_login else "there is no login: run `wandb login` or set WANDB_API_KEY"


def _first_line(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
