"""What ranks must agree on about the folder of their run."""

from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_ranks
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime
from vae_dist.run.folder import RunFolder, RunLock
from vae_dist.run.resume import newest_checkpoint
from vae_dist.training import setup
from vae_dist.training.preemption import StopRequest
from vae_dist.training.signals import StopSignals
from vae_dist.training.watch import RankWatch


def choose(path: Path) -> tuple[int, float]:
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    checkpoint = newest_checkpoint(runtime, RunFolder(path))
    assert checkpoint is not None
    return checkpoint.step, float(checkpoint.tensors["model"]["w"])


def test_every_rank_reads_the_checkpoint_that_the_main_process_chose(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    for step in (10, 20):
        tensors = {"model": {"w": torch.tensor(float(step))}}
        folder.checkpoints.save(step, tensors, {"scalars": {}}, keep_last=3)
    (folder.checkpoints.folder / "step_00000020" / "model.safetensors").write_bytes(b"torn")
    assert run_ranks(2, choose, folder.path) == [(10, 10.0)] * 2
    assert folder.checkpoints.steps() == [10]


def open_folders(paths: list[Path]) -> str:
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    folder = RunFolder(paths[runtime.rank])
    folder.create()
    sees_token = folder.sees_token
    folder.sees_token = lambda token: sees_token(token, timeout_s=0.2)  # type: ignore[method-assign]
    try:
        stop = StopRequest(runtime, StopSignals())
        watch = RankWatch(runtime, timeout_s=60, on_lost=print)
        with setup._locked(folder, runtime, stop, watch) as is_ours:
            assert is_ours and folder.session
            return "opened"
    except ConfigError as error:
        return str(error)


def test_a_run_folder_that_is_another_one_on_another_node_is_refused(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert run_ranks(2, open_folders, [one, one]) == ["opened"] * 2
    for message in run_ranks(2, open_folders, [one, other]):
        assert f"run={one} is not the same folder" in message or f"run={other}" in message
        assert "all nodes see" in message
    assert not (one / "lock.json").exists()


def refuse_while_another_waits(path: Path) -> tuple[bool, bool, bool]:
    """A run is refused, and another starter takes the lock as soon as it is free."""
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    folder, other = RunFolder(path), RunFolder(path)
    others_lock, release = RunLock(other), RunLock.release

    def release_and_be_overtaken(lock: RunLock) -> None:
        release(lock)
        assert others_lock.attempt()
        other.create()
        other.write_token()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match="refused"):
        patch.setattr(RunLock, "release", release_and_be_overtaken)
        watch = RankWatch(runtime, timeout_s=60, on_lost=print)
        with setup._locked(folder, runtime, StopRequest(runtime, StopSignals()), watch):
            raise ConfigError("refused")
    found = (other.images.is_dir(), other.checkpoints.folder.is_dir(), other.lock_path.exists())
    others_lock.release()
    return found


def test_a_refused_run_takes_nothing_from_the_next_one(tmp_path):
    assert run_ranks(1, refuse_while_another_waits, tmp_path / "run") == [(True, True, True)]


def test_a_refused_run_leaves_nothing(tmp_path):
    run_ranks(1, open_and_close, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def open_and_close(path: Path) -> None:
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    watch = RankWatch(runtime, timeout_s=60, on_lost=print)
    stop = StopRequest(runtime, StopSignals())
    with setup._locked(RunFolder(path), runtime, stop, watch):
        assert path.exists()
