import contextlib
import errno
import os

import pytest
import torch

from tests.support.distributed import run_ranks
from vae_dist.config.errors import ConfigError
from vae_dist.config.resolve import Facts
from vae_dist.config.schema import RuntimeConfig, TrainConfig
from vae_dist.distributed import Runtime
from vae_dist.run import folder as folder_module
from vae_dist.run.folder import RunFolder, RunLock
from vae_dist.run.resume import newest_checkpoint
from vae_dist.training import setup
from vae_dist.training.stop import Outcome, StopSignals


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


@contextlib.contextmanager
def held(folder, **options):
    lock = RunLock(folder, **options)
    assert lock.attempt()
    yield lock
    lock.release()


def test_a_second_trainer_is_refused_with_the_name_of_the_first(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(folder_module, "WAIT_S", 0.0)
    with held(folder):
        message = rf"run=.* in use by process {os.getpid()} on .*, job 4711, since .*run=FOLDER"
        with pytest.raises(ConfigError, match=message):
            RunLock(folder).attempt()
    with held(folder) as lock:  # given back
        folder.path.rename(folder.path.with_name("elsewhere"))
        assert lock.place() == folder.path.with_name("elsewhere")


def test_the_lock_of_a_killed_process_is_free(folder):
    child = os.fork()
    if child == 0:
        RunLock(folder).attempt()
        os._exit(0)
    os.waitpid(child, 0)
    assert f"process {child} on" in folder.holder()
    with held(folder):
        pass


@pytest.mark.parametrize(("name", "number"), [("fcntl.flock", errno.EIO), ("os.pwrite", 28)])
def test_a_lock_that_fails_leaves_no_open_file(folder, monkeypatch, name, number):
    def failing(*arguments):
        raise OSError(number, "fails")

    monkeypatch.setattr(name, failing)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="fails"):
        RunLock(folder).attempt()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_system_without_locks_costs_a_warning(folder, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    lines = []
    with held(folder, say=lines.append):
        assert "its file system has no locks (No locks available)" in lines[0]


def test_what_killed_sessions_left_half_written_is_removed(folder):
    (folder.checkpoints.folder / ".step_00000007.tmp").mkdir()
    (folder.path / ".status.json.4711.tmp").write_text("{")
    (folder.images / ".samples_00000020.png.5.tmp").write_text("")
    folder.remove_leftovers()
    assert not list(folder.path.glob("**/.*"))


def open_folders(paths: list[os.PathLike]) -> str:
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    folder = RunFolder(paths[runtime.rank])
    folder.create()
    is_held_by = folder.is_held_by
    folder.is_held_by = lambda holder: is_held_by(holder, timeout_s=0.2)  # type: ignore[method-assign]
    try:
        session = setup.Session(TrainConfig(), Facts(), runtime, folder, StopSignals())
        with session.held:
            assert session.take_folder() and session.outcome.is_ours
            return "opened"
    except ConfigError as error:
        return str(error)


def test_a_run_folder_that_is_another_one_on_another_node_is_refused(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert run_ranks(2, open_folders, [one, one]) == ["opened"] * 2
    assert not one.exists()  # nothing was trained
    for message in run_ranks(2, open_folders, [one, other]):
        assert "is not the same folder on all nodes" in message


def test_a_full_disk_does_not_keep_a_status_of_running(folder, monkeypatch):
    folder.write_status("running", step=0, reason="")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_module, "write_durably", full)
    folder.write_status("failed", step=3, reason="a reason that is longer than the one before")
    assert (folder.status()["status"], folder.status()["step"]) == ("failed", 3)


def fail_without_the_main_process(path: os.PathLike) -> bool:
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    runtime.is_main = False
    folder = RunFolder(path)
    outcome = Outcome(runtime, folder, timeout_s=60)
    outcome.is_ours = True
    outcome._on_lost("rank 0 is gone", True)
    return folder.status().get("status") == "failed"


def test_a_main_process_that_is_gone_before_it_wrote_a_status_leaves_one(folder):
    assert run_ranks(1, fail_without_the_main_process, folder.path) == [True]


def choose(path: os.PathLike) -> tuple[int, float]:
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    checkpoint = newest_checkpoint(runtime, RunFolder(path))
    assert checkpoint is not None
    return checkpoint.step, float(checkpoint.tensors["model"]["w"])


def test_the_main_process_reads_the_checkpoint_for_all(folder):
    for step in (10, 20):
        tensors = {"model": {"w": torch.tensor(float(step))}}
        folder.checkpoints.save(step, tensors, {"scalars": {}}, keep_last=3)
    (folder.checkpoints.folder / "step_00000020" / "model.safetensors").write_bytes(b"torn")
    assert run_ranks(2, choose, folder.path) == [(10, 10.0)] * 2
