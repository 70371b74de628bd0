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
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import flatten
from vae_dist.config.schema import TrainConfig
from vae_dist.files import write_durably

STEP_KEY = "trainer/step"

_MODES = {
    "auto": "auto",
    "online": "online",
    "run": "online",  # wandb's older word
    "offline": "offline",
    "dryrun": "offline",  # wandb's older word
    "disabled": "disabled",
}
_PROBE_SECONDS = 3.0
_INIT_SECONDS = 30.0
_QUEUED_ROWS = 4096
# How long close() may wait. An interrupted run has a deadline of its scheduler to meet, and what
# has not been sent is on disk; an offline run only has to write what is queued.
_CLOSE_SECONDS = {"finished": 60.0, "interrupted": 10.0, "failed": 30.0}
_CLOSE_OFFLINE_SECONDS = 10.0


class WandbSink:
    """Sink for the main process; `mode` tells what came of it: online, offline or disabled.

    `folder` is the run folder: it gets `wandb/` and `wandb_id`, the run id by which a resumed run
    goes on in the same W&B run. `say` prints a line to the user, also from the worker thread.
    Raises ConfigError when online was asked for (wandb.mode or WANDB_MODE, which wins) and cannot
    be had.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        *,
        resume_step: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        self._say = say
        self._run: Any = None
        self._wandb: Any = None
        self._sync_dir = ""
        self._broken = False
        self._closed = False
        self._num_dropped = 0
        self._stop_requested = threading.Event()
        # Rows up to here are on the server already, from before an interruption.
        self._floor = -1
        self.mode = "disabled"
        asked, source = _asked_mode(config.wandb.mode)
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

    def log(self, step: int, row: dict[str, float]) -> None:
        if step > self._floor:
            self._put({STEP_KEY: step, **row})

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        if step > self._floor:
            self._put({STEP_KEY: step, key: (Path(png_path), caption)})

    def close(self, status: str) -> None:
        """Flush and end the W&B run, within a minute; what could not be sent stays on disk."""
        if self._run is None or self._closed:
            return
        self._closed = True
        seconds = _CLOSE_SECONDS.get(status, 30.0)
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
            run_id, is_resumed = _run_id(folder, resume_step)
        except OSError as error:
            return f"{folder} cannot be written ({error.strerror})"
        try:
            import wandb
        except Exception as error:  # a broken installation shows as almost any exception
            return f"wandb cannot be imported ({_first_line(error)})"
        obstacle = "" if asked == "offline" else _obstacle_to_online(wandb, asked)
        modes: list[Any] = ["online"] if asked == "online" else ["online", "offline"]
        if asked == "offline" or (asked == "auto" and obstacle):
            modes = ["offline"]
        elif obstacle:
            return obstacle
        stop = self._stop_requested
        settings: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "init_timeout": _INIT_SECONDS,
            "finish_timeout": _CLOSE_SECONDS["finished"],
            "stop_fn": lambda: stop.set(),  # settings are deep-copied: no bound method of a lock
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
                    name=folder.resolve().name,
                    config=flatten(config),
                    settings=wandb.Settings(**known),
                )
                self._run.define_metric(STEP_KEY)
                self._run.define_metric("*", step_metric=STEP_KEY)
                if mode == "online" and self._run.resumed:
                    self._floor = int(self._run.summary.get(STEP_KEY, -1))
                self._sync_dir = str(self._run.settings.sync_dir)
            except Exception as error:  # CommError, UsageError, ConnectionResetError, OSError, ...
                self._run = None
                obstacle = f"W&B could not start a run ({_first_line(error)})"
                continue
            self._wandb = wandb
            self.mode = mode
            break
        return obstacle

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
                self._run.log({key: self._value(value) for key, value in row.items()}, commit=True)
            except Exception as error:  # wandb raises builtin and own errors of many kinds
                self._break(error)

    def _value(self, value: Any) -> Any:
        if isinstance(value, tuple):
            path, caption = value
            return self._wandb.Image(str(path), caption=caption)
        return value

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
                f"W&B stopped working ({_first_line(error)}); training goes on without it and"
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


def _asked_mode(configured: str) -> tuple[str, str]:
    """The mode and where it comes from; WANDB_MODE wins, as users of W&B expect."""
    asked = os.environ.get("WANDB_MODE")
    if not asked:
        return configured, "wandb.mode"
    if asked not in _MODES:
        raise ConfigError(
            f"WANDB_MODE={asked} is none of online, offline, disabled; unset it or set one of these"
        )
    return _MODES[asked], "WANDB_MODE"


def _run_id(folder: Path, resume_step: int) -> tuple[str, bool]:
    """The W&B run id, and whether a run of that id may exist; a sweep agent chooses its own."""
    path = folder / "wandb_id"
    if given := os.environ.get("WANDB_RUN_ID"):
        write_durably(path, given.encode())
        return given, True
    if resume_step > 0 and path.exists():
        return path.read_text().strip(), True
    run_id = secrets.token_hex(4)
    write_durably(path, run_id.encode())
    return run_id, False


def _obstacle_to_online(wandb: Any, asked: str) -> str:
    """Why no run can be sent to W&B from here, as a clause; "" when nothing is in the way."""
    try:
        settings = wandb.setup().settings
        if asked == "auto" and settings.mode in ("offline", "dryrun", "disabled"):
            return f"`wandb {settings.mode}` is set here"
        if not wandb.login(prompt=False, verify=False):
            return "nobody is logged in: run `wandb login` or set WANDB_API_KEY"
        if not _answers(settings.base_url):
            return f"{settings.base_url} does not answer"
    except Exception as error:  # malformed keys and settings raise errors of many kinds
        return f"the W&B login cannot be used: {_first_line(error)}"
    return ""


def _answers(url: str) -> bool:
    """One GET through the environment's proxies; any answer counts, even one that TLS rejects."""
    try:
        urllib.request.urlopen(url, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return "SSL" in repr(error.reason)
    except (OSError, ValueError):
        return False
    return True


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
