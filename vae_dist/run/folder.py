"""The folder of one run: its config, its status, its lock, and where everything else lies.

One run folder, one trainer: the main process holds an `flock` on the file `lock`, which says who it
is. The kernel gives the lock back when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vae_dist.config.errors import ConfigError
from vae_dist.config.load import MAX_FILE_BYTES, from_yaml, to_yaml
from vae_dist.config.schema import TrainConfig
from vae_dist.files import read_bounded, read_json, write_durably
from vae_dist.run.checkpoint import Checkpoints

MAX_STATUS_BYTES = 2**16
WAIT_S = 5.0  # for a lock: loader processes of a killed trainer hold it until they end
OPEN_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # what a link names lies elsewhere
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # of this file system


class RunFolder:
    """Paths and small files of a run folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.checkpoints = Checkpoints(Path(path) / "checkpoints")
        self.move(Path(path))

    def move(self, path: Path) -> None:
        """The folder has this name now."""
        self.path, self.checkpoints.folder = path, path / "checkpoints"
        self.config_path = self.path / "config.yaml"
        self.log_path = self.path / "log.jsonl"
        self.status_path = self.path / "status.json"
        self.stop_path = self.path / "STOP"
        self.lock_path = self.path / "lock"
        self.images = self.path / "images"

    def create(self) -> None:
        """Make the folders and the lock. Raises ConfigError when they cannot be written."""
        try:
            for folder in (self.path, self.images, self.checkpoints.folder):
                folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.lock_path, OPEN_LOCK, 0o644))
        except OSError as error:
            raise ConfigError(
                f"run={self.path}: cannot be written ({error.strerror}); "
                "choose a folder on a writable disk with run=FOLDER"
            ) from None

    def remove_leftovers(self) -> None:
        """Remove what killed processes left half written. Only for the holder of the lock."""
        for folder in (self.path, self.images, self.checkpoints.folder):
            for path in folder.glob(".*.tmp"):
                shutil.rmtree(path, ignore_errors=True)
                with contextlib.suppress(OSError):  # a file; what stays is ignored
                    path.unlink()

    def remove_if_unused(self) -> None:
        """Remove the empty folders of a run that was refused before it began. Only for the holder
        of the lock."""
        if self.config_path.exists():
            return
        with contextlib.suppress(OSError):  # not empty: in use by somebody
            self.lock_path.unlink(missing_ok=True)
            for folder in (self.checkpoints.folder, self.images, self.path):
                folder.rmdir()

    def config(self) -> TrainConfig:
        """The resolved config of the run. Raises ConfigError when this is no run folder."""
        try:
            data = read_bounded(self.config_path, MAX_FILE_BYTES)
        except (OSError, ValueError) as error:
            problem = error if self.config_path.exists() else "it has no config.yaml"
            raise ConfigError(
                f"run={self.path}: no run folder ({problem}); give the folder that vae_dist.train "
                "wrote, for example runs/mnist"
            ) from None
        return from_yaml(data)

    def write_config(self, config: TrainConfig) -> None:
        write_durably(self.config_path, to_yaml(config))

    def status(self) -> dict[str, Any]:
        """What `write_status` wrote; empty where it cannot be read."""
        try:
            return read_json(self.status_path, MAX_STATUS_BYTES)
        except (OSError, ValueError):
            return {}

    def write_status(self, status: str, *, step: int, reason: str) -> None:
        """status: running | finished | interrupted | failed."""
        # status first: launch/slurm.sbatch reads it with sed
        record = {"status": status, "step": step, "reason": reason, "time": time.time()}
        data = json.dumps(record).encode()
        try:
            write_durably(self.status_path, data)
        except OSError:  # a full disk: the file's own block takes what replaces it
            with open(self.status_path, "r+b") as file:
                file.truncate(file.write(data))

    def newest_step(self) -> int:
        """Step of the newest checkpoint, 0 when there is none."""
        return max(self.checkpoints.steps(), default=0)

    def holder(self) -> str:
        """What the last holder of the lock wrote into it; empty where it cannot be read."""
        try:
            return read_bounded(self.lock_path, 1000).decode(errors="replace")
        except (OSError, ValueError):
            return ""

    def is_held_by(self, holder: str, *, timeout_s: float = 20.0) -> bool:
        """Whether this process sees the lock of that holder: is the file system shared?"""
        end = time.monotonic() + timeout_s
        while self.holder() != holder and time.monotonic() < end:
            time.sleep(0.05)  # a network file system shows a file with some delay
        return self.holder() == holder


class RunLock:
    """The lock of a run folder: `attempt` until it is True, then `release`."""

    def __init__(self, folder: RunFolder, *, say: Callable[[str], None] = print) -> None:
        self.holder = ""  # this process, once it has the lock
        self._folder, self._say = folder, say
        self._descriptor = -1  # of the open file
        self._begun = time.monotonic()

    def attempt(self) -> bool:
        """Take the lock; False where its holder may just be ending: try again in a moment.

        Raises ConfigError with the holder's name where it goes on.
        """
        self._folder.create()
        path = self._folder.lock_path
        descriptor = os.open(path, OPEN_LOCK, 0o644)
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() - self._begun < WAIT_S:
                    return False
                holder = self._folder.holder().strip() or "another process"
                raise ConfigError(
                    f"run={path.parent}: in use by {holder}; wait for it, stop it, or choose "
                    "another folder with run=FOLDER"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self._say(
                    f"warning: run={path.parent}: its file system has no locks "
                    f"({error.strerror}); see to it that no other trainer uses this folder"
                )
            # a starter that was refused may have removed the file
            if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
                return False
            job = os.environ.get("SLURM_JOB_ID", "")
            self.holder = (
                f"process {os.getpid()} on {socket.gethostname()}{job and f', job {job}'}, "
                f"since {time.strftime('%F %T')}.{time.monotonic_ns() % 10**6:06}\n"
            )
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, self.holder.encode(), 0)
            os.fsync(descriptor)
            self._descriptor = descriptor
            opened.pop_all()
        return True

    def place(self) -> Path:
        """The folder that has the lock, under the name that it has now (on Linux)."""
        try:
            return Path(os.readlink(f"/proc/self/fd/{self._descriptor}")).parent
        except OSError:
            return self._folder.path

    def release(self) -> None:
        os.close(self._descriptor)
