"""The ranks of a run end together: launchers kill those that are left when one has gone."""

import time
from pathlib import Path

import pytest

from tests.support.distributed import run_ranks
from tests.support.training import arguments
from vae_dist.run.folder import RunFolder
from vae_dist.train import main

SLOW_S = 1.0


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
