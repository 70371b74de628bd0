import json
import os
import time

import pytest

from vae_dist.config.errors import ConfigError
from vae_dist.runfolder import STALE_AFTER_S, Holder, RunFolder, RunLock


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def write_lock(folder: RunFolder, **changes: object) -> None:
    holder = Holder.this_process().__dict__ | changes
    folder.lock_path.write_text(json.dumps(holder))


def test_a_second_trainer_is_refused_with_the_name_of_the_first(folder):
    with RunLock(folder):
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on .*run=FOLDER"):
            RunLock(folder).__enter__()
        assert folder.lock_path.exists()
    assert not list(folder.path.glob("*lock*")) and not list(folder.path.glob(".*"))


def test_a_lock_of_a_dead_process_is_taken_over(folder):
    write_lock(folder, pid=2**22 - 3, started="1.0")
    with RunLock(folder):
        assert json.loads(folder.lock_path.read_text())["pid"] == os.getpid()


def test_a_pid_that_is_used_again_does_not_hold_the_lock(folder):
    write_lock(folder, started="1.0")
    with RunLock(folder):
        pass


def test_a_lock_of_another_host_holds_while_its_heart_beats(folder):
    write_lock(folder, host="elsewhere", job="77")
    with pytest.raises(ConfigError, match=r"on elsewhere, job 77"):
        RunLock(folder).__enter__()
    long_ago = time.time() - STALE_AFTER_S - 5
    os.utime(folder.lock_path, (long_ago, long_ago))
    with RunLock(folder):
        pass


def test_a_torn_lock_holds_only_for_a_while(folder):
    folder.lock_path.write_text('{"host": "els')
    with pytest.raises(ConfigError, match="in use"):
        RunLock(folder).__enter__()
    long_ago = time.time() - STALE_AFTER_S - 5
    os.utime(folder.lock_path, (long_ago, long_ago))
    with RunLock(folder):
        pass


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run=.*cannot be written.*run=FOLDER"):
        RunFolder(tmp_path / "file" / "run").create()


def test_a_folder_without_config_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"no run folder.*runs/mnist"):
        RunFolder(tmp_path).config()


def test_status_and_token(folder):
    folder.write_status("interrupted", step=7, reason="signal SIGTERM")
    assert folder.status() | {"time": 0} == {
        "status": "interrupted",
        "step": 7,
        "reason": "signal SIGTERM",
        "time": 0,
    }
    assert folder.sees_token(folder.write_token())
    assert not folder.sees_token("another", timeout_s=0.0)


def test_a_job_that_was_started_again_waits_for_the_lock_of_its_lost_start(folder, monkeypatch):
    """A node died with the lock; the same job runs elsewhere before the lock is stale."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr("vae_dist.runfolder.HEARTBEAT_S", 0.05)
    monkeypatch.setattr("vae_dist.runfolder.STALE_AFTER_S", 0.1)
    write_lock(folder, host="elsewhere", job="77", start="0")
    with pytest.raises(ConfigError, match=r"on elsewhere, job 77"):
        RunLock(folder).__enter__()  # not while it is the same start: that one is alive
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write_lock(folder, host="elsewhere", job="77", start="0")
    with RunLock(folder):
        assert json.loads(folder.lock_path.read_text())["start"] == "1"
