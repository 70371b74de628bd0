"""What a launcher promised, held against the processes that are there."""

import pytest

from tests.support.training import arguments
from vae_dist import train
from vae_dist.train import launch_problem, main

BATCH = {"ENVIRONMENT": "BATCH", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}
AGENT = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "4"},
        {"WORLD_SIZE": "4", "EXPECTED_WORLD_SIZE": "4"},
        {"WORLD_SIZE": "4", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"},
        {**AGENT, "WORLD_SIZE": "16", "GROUP_WORLD_SIZE": "2"},  # a launcher on each node
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # a shell of salloc, no step
        {
            "SLURM_NTASKS": "8",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_ID": "4294967290",
        },  # as step
        {**BATCH, "SLURM_NTASKS": "1"},
        {**BATCH, "WORLD_SIZE": "8"},  # a launcher in the batch script
        {**BATCH, "EXPECTED_WORLD_SIZE": "1"},
        {"EXPECTED_WORLD_SIZE": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"},  # meant so
    ],
)
def test_a_promise_that_is_kept_is_no_problem(environment):
    assert launch_problem(environment) == ""


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"EXPECTED_WORLD_SIZE": "4"}, "EXPECTED_WORLD_SIZE=4 processes were promised"),
        ({"EXPECTED_WORLD_SIZE": "4", "WORLD_SIZE": "2"}, "--num_processes 4"),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, "each task would train alone"),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "WORLD_SIZE": "2"}, "srun started 4 tasks"),
        (BATCH, "its script starts one process, without srun"),
        ({**AGENT, "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}, "each with a launcher of its own"),
    ],
)
def test_a_broken_promise_is_named(environment, message):
    assert message in launch_problem(environment)


def test_train_refuses_before_it_makes_a_folder(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("EXPECTED_WORLD_SIZE", "2")
    assert main(arguments(tmp_path / "run", tmp_path)) == 2
    assert "WORLD_SIZE=1" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "pauses"), [("0", []), ("1", [train.REFUSAL_PAUSE_S])])
def test_other_ranks_leave_after_the_one_that_prints_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, pauses: list
) -> None:
    found: list[float] = []
    monkeypatch.setattr(train.time, "sleep", found.append)
    variables = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["config=debug", "optimizer.lrr=1"]) == 2
    assert found == pauses
    assert ("did you mean" in capsys.readouterr().err) == (rank == "0")
