import json
import os
import time

import psutil
import pytest

from vae_dist.config.errors import ConfigError
from vae_dist.run.folder import STALE_AFTER_S, Holder, RunFolder, RunLock


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


def test_half_written_files_of_killed_sessions_are_removed_but_not_a_starters_lock(folder):
    status = folder.path / ".status.json.4711.tmp"
    lock = folder.path / f".{folder.lock_path.name}.0123abcd.tmp"
    half_saved = folder.checkpoints.folder / ".step_00000007.tmp"
    half_saved.mkdir()
    for path in (status, lock):
        path.write_text("{")
    picture = folder.images / ".samples_00000020.png.5.tmp"
    forgotten = [
        folder.path / f".{folder.lock_path.name}.fedc{ending}" for ending in (".tmp", ".stale")
    ]
    forgotten.append(folder.path / ".probe.77")
    for path in (picture, *forgotten):
        path.write_text("")
    long_ago = time.time() - 2 * STALE_AFTER_S
    for path in forgotten:
        os.utime(path, (long_ago, long_ago))
    with RunLock(folder):
        folder.remove_leftovers()
    assert not status.exists() and not half_saved.exists() and lock.exists()
    assert not any(path.exists() for path in (picture, *forgotten))


def test_a_lock_of_a_dead_process_is_taken_over(folder):
    write_lock(folder, pid=2**22 - 3)
    with RunLock(folder):
        assert json.loads(folder.lock_path.read_text())["pid"] == os.getpid()


def test_a_pid_that_is_used_again_does_not_hold_the_lock(folder):
    since_this_boot = Holder.this_process().started.partition(" of ")[2]
    write_lock(folder, started=f"1 of {since_this_boot}" if since_this_boot else "1.0")
    with RunLock(folder):
        pass


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_lock_of_another_host_of_this_name_is_not_taken_at_once(folder):
    """A clone has this name, but was started at another time."""
    write_lock(folder, started="4711 of 00000000-0000-0000-0000-000000000000")
    assert not RunLock(folder, say=lambda text: None).attempt()
    assert folder.lock_path.exists()


@pytest.fixture
def quick(monkeypatch):
    """A lock is stale after 0.3 s, with heartbeats to fit."""
    monkeypatch.setattr("vae_dist.run.folder.HEARTBEAT_S", 0.05)
    monkeypatch.setattr("vae_dist.run.folder.STALE_AFTER_S", 0.3)


def test_a_lock_of_another_host_is_waited_for_and_refused_at_a_sign_of_life(folder):
    write_lock(folder, host="elsewhere", job="77")
    said: list[str] = []
    lock = RunLock(folder, say=said.append)
    assert not lock.attempt() and not lock.attempt()
    assert len(said) == 1 and said[0].startswith("waiting up to 60 s: run=")
    assert "held by process" in said[0] and "on elsewhere, job 77" in said[0]
    later = time.time() + 1
    os.utime(folder.lock_path, (later, later))  # its heart beats
    with pytest.raises(ConfigError, match=r"in use by .* on elsewhere, job 77"):
        lock.attempt()
    assert folder.lock_path.exists() and not list(folder.path.glob(".lock*"))


@pytest.mark.parametrize("content", [None, '{"host": "els'], ids=["silent", "torn"])
def test_a_lock_that_stays_silent_is_taken_over(folder, quick, content):
    write_lock(folder, host="elsewhere")
    if content is not None:
        folder.lock_path.write_text(content)
    said: list[str] = []
    with RunLock(folder, say=said.append):
        assert json.loads(folder.lock_path.read_text())["pid"] == os.getpid()
    assert len(said) == 1


def test_a_lock_that_was_silent_for_long_is_taken_over_at_once(folder):
    write_lock(folder, host="elsewhere", job="77")
    long_ago = time.time() - STALE_AFTER_S - 5
    os.utime(folder.lock_path, (long_ago, long_ago))
    assert RunLock(folder, say=pytest.fail).attempt()


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
        "session": "",
        "status": "interrupted",
        "step": 7,
        "reason": "signal SIGTERM",
        "time": 0,
    }
    assert folder.sees_token(folder.write_token())
    assert not folder.sees_token("another", timeout_s=0.0)


def test_a_job_that_was_started_again_takes_its_own_lock_over_at_once(folder, monkeypatch):
    """A node died with the lock; SLURM runs the same job elsewhere before the lock is stale."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write_lock(folder, host="elsewhere", job="77", start="0")
    assert not RunLock(folder).attempt()  # while it is the same start, that one may be alive
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = RunLock(folder, say=pytest.fail)
    assert lock.attempt()
    assert json.loads(folder.lock_path.read_text())["start"] == "1"
    lock.release()
    write_lock(folder, host="elsewhere", job="78", start="0")
    assert not RunLock(folder).attempt()  # another job's


def test_a_refused_starter_that_leaves_takes_nothing_from_the_next_one(folder, monkeypatch):
    """The next one takes the lock in the moment in which it is given back."""
    first, second = RunLock(folder), RunLock(folder)
    assert first.attempt()
    folder.remove_rooms_if_unused()
    assert not folder.images.exists()
    first.release()
    assert second.attempt()
    folder.create()
    folder.remove_if_empty()  # the last act of the first one
    assert folder.images.is_dir() and folder.checkpoints.folder.is_dir()
    assert folder.lock_path.exists()
    second.release()


def test_a_folder_that_goes_while_the_lock_is_taken_is_made_again(folder, monkeypatch):
    write_text, lock = type(folder.path).write_text, RunLock(folder)

    def gone_at_first(path, text):
        monkeypatch.undo()
        folder.remove_rooms_if_unused()
        folder.remove_if_empty()
        return write_text(path, text)

    monkeypatch.setattr(type(folder.path), "write_text", gone_at_first)
    assert not lock.attempt() and not folder.path.exists()
    assert lock.attempt()
    lock.release()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_clock_that_is_set_does_not_free_a_living_holder(folder, monkeypatch):
    """The time at which a process began, by the clock, follows the clock."""
    with RunLock(folder):
        began = psutil.Process().create_time()
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: began + 3600)
        with pytest.raises(ConfigError, match="in use by process"):
            RunLock(folder).attempt()
