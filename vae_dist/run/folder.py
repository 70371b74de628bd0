"""The folder of one run: its config, its status, its lock, and where everything else lies.

One run folder, one trainer. The lock file names its holder (host, pid, start time, job) and is
touched every few seconds; a second trainer is refused with that name. A lock is stale when its
process is gone (same host), when it is of an earlier start of the same SLURM job, or when it has
not been touched for STALE_AFTER_S (other hosts). A second trainer waits that long for a holder on
another host, and is refused at the holder's next sign of life.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_dist.config.errors import ConfigError
from vae_dist.config.load import from_yaml, to_yaml
from vae_dist.config.schema import TrainConfig
from vae_dist.files import write_durably
from vae_dist.run.checkpoint import Checkpoints

HEARTBEAT_S = 5.0
STALE_AFTER_S = 60.0


class RunFolder:
    """Paths and small files of a run folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.log_path = self.path / "log.jsonl"
        self.status_path = self.path / "status.json"
        self.stop_path = self.path / "STOP"
        self.lock_path = self.path / "lock.json"
        self.images = self.path / "images"
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.session = ""  # the token of the session that holds the folder

    def create(self) -> None:
        """Make the folders. Raises ConfigError when they cannot be written."""
        try:
            for folder in (self.path, self.images, self.checkpoints.folder):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"run={self.path}: cannot be written ({error.strerror}); "
                "choose a folder on a writable disk with run=FOLDER"
            ) from None

    def remove_rooms_if_unused(self) -> None:
        """Take back what `create` made inside, where a run was refused before it began. Only for
        the holder of the lock: another starter makes its own after it has the lock."""
        if not self.has_config():
            (self.path / ".token").unlink(missing_ok=True)
            for folder in (self.checkpoints.folder, self.images):
                with contextlib.suppress(OSError):  # not empty: not ours to remove
                    folder.rmdir()

    def remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):  # not empty: somebody has begun to use it
            self.path.rmdir()

    def remove_leftovers(self) -> None:
        """Remove what killed processes left half written. Only for the holder of the lock; what
        other starters are just writing, to ask for it, stays."""
        asking = f".{self.lock_path.name}."
        for path in (*self.path.glob(".*.tmp"), *self.images.glob(".*.tmp")):
            if not path.name.startswith(asking):
                _remove(path)
        for path in (*self.path.glob(f"{asking}*"), *self.path.glob(".probe.*")):
            with contextlib.suppress(OSError):
                # both by the file server's clock
                if self.lock_path.stat().st_mtime - path.stat().st_mtime > STALE_AFTER_S:
                    _remove(path)
        self.checkpoints.remove_leftovers()

    def has_config(self) -> bool:
        return self.config_path.exists()

    def config(self) -> TrainConfig:
        """The resolved config of the run. Raises ConfigError when this is no run folder."""
        try:
            text = self.config_path.read_text()
        except OSError:
            raise ConfigError(
                f"run={self.path}: no run folder (it has no config.yaml); "
                "give the folder that vae_dist.train wrote, for example runs/mnist"
            ) from None
        return from_yaml(text)

    def write_config(self, config: TrainConfig) -> None:
        write_durably(self.config_path, to_yaml(config).encode())

    def status(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.status_path.read_bytes()))
        except (OSError, ValueError):
            return {}

    def newest_step(self) -> int:
        """Step of the newest checkpoint, 0 when there is none."""
        return max(self.checkpoints.steps(), default=0)

    def write_status(self, status: str, *, step: int, reason: str) -> None:
        """status: running | finished | interrupted | failed."""
        record = {
            "status": status,  # first: launch/slurm.sbatch reads it with sed
            "step": step,
            "reason": reason,
            "time": time.time(),
            "session": self.session,
        }
        write_durably(self.status_path, json.dumps(record).encode())

    def write_token(self) -> str:
        """A fresh mark that every rank must be able to read, if the file system is shared."""
        token = uuid.uuid4().hex
        write_durably(self.path / ".token", token.encode())
        return token

    def sees_token(self, token: str, *, timeout_s: float = 20.0) -> bool:
        end = time.monotonic() + timeout_s
        while not self.has_token(token):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)  # a network file system shows a new file with some delay
        return True

    def is_taken_over(self) -> bool:
        """Whether another session holds the folder now: it believed this one dead."""
        try:
            return bool(self.session) and (self.path / ".token").read_text() != self.session
        except OSError:  # a disk that is away for a while says nothing
            return False

    def has_token(self, token: str) -> bool:
        """Whether the session that wrote it is the last one that took the folder."""
        try:
            return (self.path / ".token").read_text() == token
        except OSError:
            return False


@dataclass(frozen=True)
class Holder:
    """Who holds a run folder."""

    host: str
    pid: int
    started: str  # of the process: a pid alone may be used again
    namespace: str  # pids of different containers do not compare
    job: str
    start: str = ""  # of that job: SLURM starts a preempted one again under the same number

    @classmethod
    def this_process(cls) -> Holder:
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_process_start(os.getpid()),
            namespace=_pid_namespace(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            start=os.environ.get("SLURM_RESTART_COUNT", "0"),
        )

    def is_here(self) -> bool:
        """Whether its pid says whether it lives: on this host since its last start, which another
        one of that name (a clone, a container) does not share."""
        is_same_host = self.host == socket.gethostname() and self.namespace == _pid_namespace()
        return is_same_host and _boot(self.started) == _boot(_process_start(os.getpid()))

    def is_earlier_start(self) -> bool:
        """Whether SLURM has ended it and started its job again, here."""
        now = Holder.this_process()
        return bool(self.job) and self.job == now.job and self.start != now.start

    def is_gone(self, *, heartbeat_age_s: float) -> bool:
        if self.is_here():
            return _process_start(self.pid) != self.started
        return self.is_earlier_start() or heartbeat_age_s > STALE_AFTER_S

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class RunLock:
    """The lock of a run folder, with its heartbeat.

    Use `attempt` until it is True, then `release`; or use it as a context manager, which waits.
    name: what messages call the folder, key=value.
    """

    def __init__(
        self, folder: RunFolder, *, name: str = "", say: Callable[[str], None] = print
    ) -> None:
        self.path = folder.lock_path
        self._name = name or f"run={folder.path}"
        self._say = say
        self._inode = -1
        self._waited_for: tuple[int, float] | None = None  # inode and last touch when first seen
        self._released = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="run-lock", daemon=True)

    def __enter__(self) -> RunLock:
        while not self.attempt():
            time.sleep(HEARTBEAT_S / 5)
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def attempt(self) -> bool:
        """Take the lock; False where the holder may be dead: try again in a moment.

        Raises ConfigError with the holder's name where it lives.
        """
        holder = json.dumps(Holder.this_process().__dict__)
        mine = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            mine.write_text(holder)
        except FileNotFoundError:  # a refused starter has just removed its empty folder
            return False
        try:
            while not self._take(mine):
                if not self._remove_if_stale(mine):
                    return False
        finally:
            mine.unlink()
        self._inode = self.path.stat().st_ino
        self._heartbeat.start()
        return True

    def release(self) -> None:
        self._released.set()
        self._heartbeat.join()
        if self._is_mine():
            with contextlib.suppress(OSError):  # a disk that is gone has no lock to hold
                self.path.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        """False after another host took the lock over, believing this process dead."""
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False

    def _take(self, mine: Path) -> bool:
        try:
            os.link(mine, self.path)  # atomic also on NFS, and the content is there at once
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                return False
            with open(descriptor, "w") as file:
                file.write(mine.read_text())
        return True

    def _remove_if_stale(self, mine: Path) -> bool:
        """True when the lock is free now; False when it is to be seen whether its holder lives."""
        try:
            seen = self.path.stat()
            age_s = mine.stat().st_mtime - seen.st_mtime  # both by the file server's clock
            holder = Holder(**json.loads(self.path.read_text()))
        except FileNotFoundError:
            return True  # released in between
        except (ValueError, TypeError):  # cut off while it was written
            holder = Holder(host="an unknown host", pid=0, started="", namespace="", job="")
        if not holder.is_gone(heartbeat_age_s=age_s):
            self._refuse_if_alive(holder, seen, age_s)
            return False
        stale = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.stale")
        try:
            os.rename(self.path, stale)
        except FileNotFoundError:  # another process took it over first
            return True
        if stale.stat().st_ino != seen.st_ino:  # the lock of one that was faster: give it back
            with contextlib.suppress(FileExistsError):
                os.link(stale, self.path)
        stale.unlink()
        return True

    def _refuse_if_alive(self, holder: Holder, seen: os.stat_result, age_s: float) -> None:
        """Raises ConfigError at a sign of life; says at first how long it will be waited for."""
        first_look = self._waited_for is None
        lives = holder.is_here() or self._waited_for not in (None, (seen.st_ino, seen.st_mtime))
        if lives:
            raise ConfigError(
                f"{self._name}: in use by {holder} (last sign of life "
                f"{max(0, age_s):.0f} s ago); wait for it, stop it, or choose another folder "
                f"with {self._name.partition('=')[0]}=FOLDER"
            )
        if first_look:
            self._waited_for = (seen.st_ino, seen.st_mtime)
            self._say(
                f"waiting up to {STALE_AFTER_S - max(0, age_s):.0f} s: {self._name} is "
                f"held by {holder}, last sign of life {max(0, age_s):.0f} s ago; without another "
                "one the run goes on here"
            )

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            # the folder may be unreachable for a while; training goes on
            with contextlib.suppress(OSError):
                if self._is_mine():
                    os.utime(self.path)


def _remove(path: Path) -> None:
    """What a disk does not let go is in nobody's way, and stays."""
    with contextlib.suppress(OSError):
        path.unlink()


def _process_start(pid: int) -> str:
    """When a process began, or "" when there is none.

    In clock ticks since boot, with the boot's id: a wall time would change with the clock, and a
    lock whose holder lives would look stale. Elsewhere than on Linux the wall time has to do.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        created = f"{process.create_time():.1f}"
    except psutil.Error:
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{after_name[19]} of {boot}"  # field 22 of proc(5)
    except (OSError, IndexError):
        return created


def _boot(started: str) -> str:
    """The id of the boot in what `_process_start` found, "" where it has none."""
    return started.partition(" of ")[2]


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
