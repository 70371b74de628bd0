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
CASES = {  # where it is, the name, the rank that fails, its error, and what all say
    "second read of the index": (data, "_loaded", 1, WRONG, OF_RANK_1),
    "environment.json": (trackers, "add_session", 0, FULL, "/run/file: No space left on device"),
    "weights to begin with": (setup, "initial_weights", 1, WRONG, OF_RANK_1),
    "what nobody foresaw": (setup, "check_identity", 1, BUG, "rank 1: Traceback"),
}
QUIET = ("evaluation.every=0", "checkpoint.every=2", "runtime.timeout_s=5")
SLOW_S = 1.0  # of a disk


@pytest.fixture(scope="module")
def begun(tmp_path_factory, digits):
    """A run of two steps."""
    run = tmp_path_factory.mktemp("begun") / "run"
    assert train(run, digits, "training.steps=2", *QUIET) == [0]
    return run


@pytest.mark.parametrize("case", CASES)
def test_an_error_of_one_rank_before_training_ends_all(
    begun, digits, tmp_path, monkeypatch, capfd, case
):
    owner, name, rank, error, words = CASES[case]
    function, before = getattr(owner, name), status(begun)

    def failing(*args, **kwargs):  # forked ranks inherit this
        if os.environ["RANK"] == str(rank):
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    is_new, is_bug = case == "weights to begin with", error is BUG
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
    """Train on a slow disk; when this rank was done."""
    write_status = RunFolder.write_status

    def slowly(folder, status, *, step, reason):
        if status == "finished":
            time.sleep(SLOW_S)
        write_status(folder, status, step=step, reason=reason)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_status", slowly)
        assert main(arguments(run, digits, "training.steps=1")) == 0
    return time.monotonic()


def test_no_rank_leaves_before_the_main_one_has_written_all(tmp_path, digits):
    ends_s = run_ranks(2, leave, tmp_path / "run", digits)
    assert max(ends_s) - min(ends_s) < SLOW_S / 2
