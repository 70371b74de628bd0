"""Ranks end together: what goes wrong on one before training is said by all, and none leaves before
the main one has written all."""

import errno
import os
import time

import pytest

from tests.support.distributed import run_ranks
from tests.support.training import arguments, status, train
from vae_dist.config.errors import ConfigError
from vae_dist.run.checkpoint import Checkpoints
from vae_dist.run.folder import RunFolder
from vae_dist.train import main
from vae_dist.training import data, setup, trackers

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/file")
WRONG, BUG = ConfigError("the shards are others here"), KeyError("a bug")
OF_RANK_1 = "rank 1: the shards are others here"
QUIET = ("evaluation.every=0", "checkpoint.every=2", "runtime.timeout_s=5")


@pytest.fixture(scope="module")
def begun(tmp_path_factory, digits):
    """A run of two steps."""
    run = tmp_path_factory.mktemp("begun") / "run"
    assert train(run, digits, "training.steps=2", *QUIET) == [0]
    return run


@pytest.mark.parametrize(
    ("owner", "name", "rank", "error", "words"),
    [
        (data, "_loaded", 1, WRONG, OF_RANK_1),  # the second read of the index
        (trackers, "add_session", 0, FULL, "/run/file: No space left on device"),
        (setup, "initial_weights", 1, WRONG, OF_RANK_1),
        (setup, "check_identity", 1, BUG, "rank 1: Traceback"),
    ],
)
def test_an_error_of_one_rank_before_training_ends_all(
    begun, digits, tmp_path, monkeypatch, capfd, owner, name, rank, error, words
):
    function, before = getattr(owner, name), status(begun)

    def failing(*args, **kwargs):  # forked ranks inherit this
        if os.environ["RANK"] == str(rank):
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    is_new, is_bug = name == "initial_weights", error is BUG
    run, more = (tmp_path / "run", [f"init_from={begun}"]) if is_new else (begun, [])
    options = ("training.steps=4", *more, *QUIET)
    assert train(run, digits, *options, world=2) == [1 if is_bug else 2] * 2
    output = capfd.readouterr()
    assert words in output.err
    assert Checkpoints(begun / "checkpoints").steps() == [2] and run.exists() != is_new
    if is_bug:
        assert "failed: rank 1: KeyError: 'a bug'" in output.out
        assert status(begun)["status"] == "failed" and "'a bug'" in status(begun)["reason"]
    else:
        assert status(begun) == before  # refused: the run is as it was


def leave(run, digits):
    """Train on a slow disk; how the run had ended when this rank was done."""
    write_status = RunFolder.write_status

    def slowly(folder, status, *, step, reason):
        if status == "finished":
            time.sleep(1)
        write_status(folder, status, step=step, reason=reason)

    RunFolder.write_status = slowly
    assert main(arguments(run, digits, "training.steps=1")) == 0
    return status(run)["status"]


def test_no_rank_leaves_before_the_main_one_has_written_all(tmp_path, digits):
    assert run_ranks(2, leave, tmp_path / "run", digits) == ["finished"] * 2
