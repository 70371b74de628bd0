import contextlib
import errno
import os
from unittest.mock import Mock

import pytest

from tests.support.distributed import run_ranks
from vae_dist.config.errors import ConfigError
from vae_dist.config.resolve import Facts
from vae_dist.config.schema import RuntimeConfig, TrainConfig
from vae_dist.distributed import Runtime
from vae_dist.run import folder as folder_module
from vae_dist.run.folder import RunFolder, RunLock
from vae_dist.training import setup
from vae_dist.training.stop import StopSignals


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def failing(number):
    return Mock(side_effect=OSError(number, os.strerror(number)))


@contextlib.contextmanager
def held(folder, **options):
    lock = RunLock(folder, **options)
    assert lock.attempt()
    yield lock
    lock.release()


def test_a_second_trainer_is_refused_with_the_name_of_the_first(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(folder_module, "WAIT_S", 0.0)
    message = rf"run=.* in use by process {os.getpid()} on .*, job 4711, since .*run=FOLDER"
    with held(folder), pytest.raises(ConfigError, match=message):
        RunLock(folder).attempt()
    if (child := os.fork()) == 0:  # it has been given back
        RunLock(folder).attempt()
        os._exit(0)
    os.waitpid(child, 0)
    assert f"process {child} on" in folder.holder()
    with held(folder):  # that of a killed process is free
        pass


def test_a_file_system_without_locks_costs_a_warning(folder, monkeypatch):
    monkeypatch.setattr("fcntl.flock", failing(errno.ENOLCK))
    lines = []
    with held(folder, say=lines.append):
        assert "its file system has no locks (No locks available)" in lines[0]


def test_what_killed_sessions_left_half_written_is_removed(folder):
    (folder.checkpoints.folder / ".step_00000007.tmp").mkdir()
    (folder.path / ".status.json.4711.tmp").touch()
    (folder.images / ".samples_00000020.png.5.tmp").touch()
    folder.remove_leftovers()
    assert not list(folder.path.glob("**/.*"))


def test_a_full_disk_does_not_keep_a_status_of_running(folder, monkeypatch):
    folder.write_status("running", step=0, reason="")
    monkeypatch.setattr(folder_module, "write_durably", failing(errno.ENOSPC))
    folder.write_status("failed", step=3, reason="a reason that is longer than the one before")
    assert (folder.status()["status"], folder.status()["step"]) == ("failed", 3)


# on several ranks


def open_folders(paths):
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    folder = RunFolder(paths[runtime.rank])
    folder.create()
    is_held_by = folder.is_held_by
    folder.is_held_by = lambda holder: is_held_by(holder, timeout_s=0.2)
    try:
        session = setup.Session(TrainConfig(), Facts(), runtime, folder, StopSignals())
        with session.held:
            session.take_folder()
            assert session.holds_folder
            return "opened"
    except ConfigError as error:
        return str(error)


def test_a_run_folder_that_is_another_one_on_another_node_is_refused(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert run_ranks(2, open_folders, [one, one]) == ["opened"] * 2
    assert not one.exists()  # nothing was trained
    for message in run_ranks(2, open_folders, [one, other]):
        assert "is not the same folder on all nodes" in message
