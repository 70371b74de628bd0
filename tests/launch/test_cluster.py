"""The launch scripts on a real SLURM: every way in which a job can end, with real training.

A run on two processes that was stopped in whatever way and went on ends bit for bit as one that
was left alone. What the script decides without a cluster is in test_scripts.
"""

import sys

import pytest

from tests.support.slurm.cluster import ROOT, TWO_BY_ONE, Job, preempt, wait_until, warn
from tests.support.training import rows, status

pytestmark = pytest.mark.slow


def test_a_run_on_two_nodes_finishes(cluster, digits, tmp_path, alone):
    job = Job(cluster, digits, tmp_path / "run", *TWO_BY_ONE)
    assert job.ended_as(alone) == 0
    logs = sorted(path.name for path in (job.run / "logs").iterdir())
    assert logs == [f"{job.number}-n1.log", f"{job.number}-n2.log"]
    assert "on n1: rank 0 cpu" in job.said() and "on n2: rank 1 cpu" in job.said()


@pytest.mark.parametrize(("stop", "partition"), [(warn, "main"), (preempt, "spot")])
def test_stopped_from_outside_it_saves_goes_on_and_ends_the_same(
    cluster, digits, tmp_path, alone, stop, partition
):
    job = Job(cluster, digits, tmp_path / "run", f"--partition={partition}", *TWO_BY_ONE)
    job.reached(5)
    stop(job)
    assert job.ended_as(alone) >= 1
    if stop is warn:
        assert "asking the trainer to save" in job.said() and "interrupted: requeued" in job.said()


def test_a_dead_node_gives_the_job_back_to_the_queue_and_it_ends_the_same(
    cluster, digits, tmp_path, alone
):
    often = ("checkpoint.every=5",)
    job = Job(cluster, digits, tmp_path / "run", *TWO_BY_ONE, overrides=often)
    job.reached(7)
    # a thread writes the checkpoint; without one it rightly begins anew
    wait_until((job.run / "checkpoints" / "latest").exists, 60, job.said)
    cluster.kill_node("n1")  # which runs the batch script and rank 0
    cluster.wait(job.number, ["PENDING"])
    cluster.boot("n1")
    assert job.ended_as(alone) >= 1


def test_an_array_trains_one_run_a_seed(cluster, digits, tmp_path):
    few = ("training.steps=3",)
    job = Job(cluster, digits, tmp_path / "runs", "--array=3,5", script="sweep", overrides=few)
    first_losses = set()
    for seed in (3, 5):
        cluster.wait(f"{job.number}_{seed}")
        run = job.run / f"seed_{seed}"
        assert status(run)["status"] == "finished", job.said()
        first_losses.add(rows(run)[1]["train/loss"])
    assert len(first_losses) == 2


WRONG = [
    ("", "optimizer.lrr=1", "", "did you mean optimizer.lr"),
    ("--nodes=2 --ntasks-per-node=3", "", "", "6 processes cannot share data.slots=16"),
    ("--gpus-per-node=2", "", "", "submit with --ntasks-per-node=2"),
    ("--nodes=2 --ntasks=3 --ntasks-per-node=2", "", "", "leave --ntasks out"),
    ("", "", "LAUNCHER=mpirun", "LAUNCHER=mpirun is neither tasks nor accelerate"),
    ("--nodes=2", "", "HEAD_ADDR=nowhere", "nowhere is not resolved on every node"),
    ("", "", "ACTIVATE=module load nothing", "module: command not found"),
]


def test_a_wrong_submission_fails_in_seconds_with_the_reason(cluster, digits, tmp_path):
    jobs = []
    for number, (options, overrides, setting, message) in enumerate(WRONG):
        variables = dict([setting.split("=")] if setting else [])
        more = {"overrides": overrides.split(), **variables}
        run = tmp_path / f"run{number}"
        jobs.append((Job(cluster, digits, run, *options.split(), **more), message))
    for job, message in jobs:
        assert cluster.wait(job.number, timeout_s=40)["ExitCode"] == "2:0", job.said()
        assert message in job.said() and not job.run.exists()


def test_srun_without_a_launch_script_is_refused(cluster):
    command = f"PYTHONPATH={ROOT} {sys.executable} -m vae_dist.train config=debug 2>&1"
    said = cluster.run("srun", "--ntasks=2", "bash", "-c", f"{command}; echo code $?")
    assert said.count("each task would train alone") == 2 and said.count("code 2") == 2


def test_sbatch_accepts_every_script(cluster):
    for script in ("slurm", "sweep", "pack"):
        cluster.run("sbatch", "--test-only", f"launch/{script}.sbatch", "config=debug")
