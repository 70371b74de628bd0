"""What a launcher promised, held against the processes that are there."""

import pytest

from tests.support.training import arguments
from vae_dist.config.automatic import launch_problem
from vae_dist.train import main


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "4"},
        {"WORLD_SIZE": "4", "EXPECTED_WORLD_SIZE": "4"},
        {"WORLD_SIZE": "4", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"},
        {"WORLD_SIZE": "16", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"},  # a launcher on each node
        {"SLURM_NTASKS": "8"},  # a shell of salloc, no step
        {"EXPECTED_WORLD_SIZE": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"},  # meant so
    ],
)
def test_a_promise_that_is_kept_is_no_problem(environment):
    assert launch_problem(environment) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"EXPECTED_WORLD_SIZE": "4"}, "EXPECTED_WORLD_SIZE=4 processes were promised"),
        ({"EXPECTED_WORLD_SIZE": "4", "WORLD_SIZE": "2"}, "--num_processes 4"),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, "each task would train alone"),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "WORLD_SIZE": "2"}, "SLURM_NTASKS=4"),
    ],
)
def test_a_broken_promise_is_named(environment, message):
    problem = launch_problem(environment)
    assert problem is not None and message in problem


def test_train_refuses_before_it_makes_a_folder(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("EXPECTED_WORLD_SIZE", "2")
    assert main(arguments(tmp_path / "run", tmp_path)) == 2
    assert "WORLD_SIZE=1" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
