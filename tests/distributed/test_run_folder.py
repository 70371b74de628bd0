"""What ranks must agree on about the folder of their run."""

from pathlib import Path

import torch

from tests.support.distributed import run_ranks
from vae_dist import session
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import RuntimeConfig
from vae_dist.runfolder import RunFolder
from vae_dist.runtime import Runtime
from vae_dist.training.resume import newest_checkpoint


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
        with session._locked(folder, runtime):
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
