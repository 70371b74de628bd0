"""Ranks end together: what goes wrong on one before training is said by all, and none leaves before
the main one has written all."""

import errno
import os
import time
from pathlib import Path

import pytest

from tests.support.distributed import run_ranks
from tests.support.training import arguments, status, train
from vae_dist.config.errors import ConfigError
from vae_dist.run.checkpoint import Checkpoints, TornCheckpoint
from vae_dist.run.folder import RunFolder
from vae_dist.train import main
from vae_dist.training import build, setup, trackers

TORN = TornCheckpoint("step_00000002/model.safetensors is damaged")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/file")
WRONG = ConfigError("the shards are others here")
CASES = {  # where it is, the name, the rank that fails, its error, and what all say
    "config of the run": (setup, "as_in_run_folder", 1, WRONG, "rank 1: the shards"),
    "second read of the index": (build, "_loaded", 1, WRONG, "rank 1: the shards"),
    "checkpoint": (Checkpoints, "load", 0, TORN, "none of the 1 checkpoints in"),
    "weights to restore": (setup, "_restore", 1, WRONG, "rank 1: the shards"),
    "environment.json": (trackers, "add_session", 0, FULL, "/run/file: No space left on device"),
}
FAST = ("second read of the index", "checkpoint", "environment.json")
SLOW_S = 1.0  # of a disk
QUIET = ("evaluation.every=0", "checkpoint.every=2")


@pytest.fixture(scope="module")
def begun(tmp_path_factory, digits):
    """A run of two steps."""
    run = tmp_path_factory.mktemp("begun") / "run"
    assert train(run, digits, "training.steps=2", *QUIET, world=2) == [0, 0]
    return run


def fails_on(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, rank: int, error) -> None:
    """Forked ranks inherit this."""
    function = getattr(owner, name)

    def failing(*args, **kwargs):
        if os.environ["RANK"] == str(rank):
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in CASES]
)
def test_an_error_of_one_rank_before_training_ends_all(begun, digits, monkeypatch, capfd, case):
    owner, name, rank, error, words = CASES[case]
    before = status(begun)
    fails_on(monkeypatch, owner, name, rank, error)
    assert train(begun, digits, "training.steps=4", *QUIET, world=2) == [2, 2]
    assert words in capfd.readouterr().err
    assert status(begun) == before  # refused: the run is as it was
    assert Checkpoints(begun / "checkpoints").steps() == [2]


def test_weights_to_begin_with_that_one_rank_cannot_read(
    begun, digits, tmp_path, monkeypatch, capfd
):
    fails_on(monkeypatch, setup, "initial_weights", 1, ConfigError("init_from=: no such file"))
    options = ("training.steps=4", f"init_from={begun}", *QUIET)
    assert train(tmp_path / "run", digits, *options, world=2) == [2, 2]
    assert "rank 1: init_from=: no such file" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_nobody_foresaw_on_one_rank_is_named_by_the_others(begun, digits, monkeypatch, capfd):
    fails_on(monkeypatch, setup, "check_identity", 1, KeyError("a bug"))
    options = ("training.steps=4", "runtime.timeout_s=20", *QUIET)
    assert train(begun, digits, *options, world=2) == [1, 1]
    output = capfd.readouterr()
    assert "failed: rank 1: KeyError: 'a bug'" in output.out and "rank 1: Traceback" in output.err
    found = status(begun)
    assert found["status"] == "failed" and "KeyError: 'a bug'" in found["reason"]


def leave(run: Path, digits: Path) -> float:
    """Train on a slow disk; when this rank was done."""
    write_status = RunFolder.write_status

    def slowly(folder: RunFolder, status: str, *, step: int, reason: str) -> None:
        if status == "finished":
            time.sleep(SLOW_S)
        write_status(folder, status, step=step, reason=reason)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_status", slowly)
        code = main(arguments(run, digits, "training.steps=2", "evaluation.every=0"))
    assert code == 0
    return time.monotonic()


def test_no_rank_leaves_before_the_main_one_has_written_all(tmp_path, digits):
    ends_s = run_ranks(2, leave, tmp_path / "run", digits)
    assert max(ends_s) - min(ends_s) < SLOW_S / 2
