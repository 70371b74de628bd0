import errno
import functools
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.support.distributed import run_ranks
from tests.support.training import arguments
from vae_dist.config.errors import ConfigError
from vae_dist.run import folder as folder_module
from vae_dist.run.folder import RunFolder, RunLock
from vae_dist.train import main


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def failing(number):
    return Mock(side_effect=OSError(number, os.strerror(number)))


def test_one_trainer_holds_the_lock_and_others_are_told_who_it_is(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(folder_module, "WAIT_S", 0.0)
    first = RunLock(folder)
    assert first.attempt()
    message = rf"run=.* in use by process {os.getpid()} on .*, job 4711, since .*run=FOLDER"
    with pytest.raises(ConfigError, match=message):
        RunLock(folder).attempt()
    folder.lock_path.write_text("")
    with pytest.raises(ConfigError, match="in use by another process; wait for it"):
        RunLock(folder).attempt()
    first.release()
    if (child := os.fork()) == 0:
        RunLock(folder).attempt()
        os._exit(0)
    os.waitpid(child, 0)
    assert f"process {child} on" in folder.holder()
    assert RunLock(folder).attempt()  # that of a killed process is free
    folder.lock_path.unlink()
    folder.lock_path.symlink_to(folder.path / "other")
    with pytest.raises(ConfigError, match="symbolic links"):
        RunLock(folder).attempt()


def test_a_file_system_without_locks_costs_a_warning(folder, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.flock", failing(errno.ENOLCK))
    assert RunLock(folder).attempt()
    assert "its file system has no locks (No locks available)" in capsys.readouterr().out


def test_what_killed_sessions_left_half_written_is_removed(folder):
    (folder.checkpoints.folder / ".step_00000007.tmp").mkdir()
    (folder.path / ".status.json.4711.tmp").touch()
    (folder.images / ".samples_00000020.png.5.tmp").touch()
    folder.remove_leftovers()
    assert not list(folder.path.glob("**/.*"))


def test_a_full_disk_does_not_keep_a_status_of_running(folder, monkeypatch):
    folder.write_status("running", step=0, reason="longer than the one that follows")
    monkeypatch.setattr(folder_module, "write_durably", failing(errno.ENOSPC))
    folder.write_status("failed", step=3, reason="")
    assert (folder.status()["status"], folder.status()["step"]) == ("failed", 3)


def test_a_folder_that_nodes_do_not_share_is_refused(tmp_path, digits, monkeypatch, capfd):
    wait = functools.partialmethod(RunFolder.is_held_by, timeout_s=0.2)
    monkeypatch.setattr(RunFolder, "is_held_by", wait)

    def begin():
        (tmp_path / os.environ["RANK"]).mkdir()
        os.chdir(tmp_path / os.environ["RANK"])
        return main(arguments(Path("run"), digits))

    assert run_ranks(2, begin) == [2, 2]
    assert "run=run is not the same folder on all nodes" in capfd.readouterr().err
    assert not list(tmp_path.glob("*/run"))  # nothing was trained
