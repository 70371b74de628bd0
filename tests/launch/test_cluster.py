"""The launch scripts on a real SLURM: every way in which a job can end, with real training.

A run on two processes that was stopped in whatever way and went on ends bit for bit as one that
was left alone. What the script decides without a cluster is in test_scripts.
"""

import sys

import pytest

from tests.support.slurm.cluster import OPTIONS, ROOT, STEPS, Job, started, wait_until
from tests.support.training import arguments, rows, status, train

pytestmark = pytest.mark.slow
TWO_BY_ONE = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def cluster():
    """Signals reach every process of a task."""
    yield from started("linuxproc")


@pytest.fixture(scope="module")
def cgroup_cluster():
    """Signals reach the task alone, as on most real clusters."""
    yield from started("cgroup")


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    """The run of two processes of this machine that nothing stops."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(run, digits, *OPTIONS, world=2) == [0, 0]
    return run


def warn(job):
    """As --signal=B:USR1@N does before the time limit."""
    job.cluster.run("scancel", "--signal=USR1", "--batch", job.number)


def preempt(job):
    """A job of the higher partition takes both nodes for a moment."""
    job.cluster.run("srun", "--partition=main", "--nodes=2", "--ntasks=16", "sleep", "1")


def test_a_run_on_two_nodes_finishes(cluster, digits, tmp_path, alone):
    job = Job(cluster, digits, tmp_path / "run", *TWO_BY_ONE)
    assert job.ended_as(alone) == 0
    logs = sorted(path.name for path in (job.run / "logs").iterdir())
    assert logs == [f"{job.number}-n1.log", f"{job.number}-n2.log"]
    assert "on n1: rank 0 cpu" in job.said() and "on n2: rank 1 cpu" in job.said()


@pytest.mark.parametrize(
    ("name", "stop", "partition", "launcher"),
    [
        ("cluster", warn, "main", "tasks"),
        ("cluster", preempt, "spot", "tasks"),
        ("cgroup_cluster", preempt, "spot", "accelerate"),
    ],
)
def test_stopped_from_outside_it_saves_goes_on_and_ends_the_same(
    request, digits, tmp_path, alone, name, stop, partition, launcher
):
    options = (f"--partition={partition}", *TWO_BY_ONE)
    cluster = request.getfixturevalue(name)
    job = Job(cluster, digits, tmp_path / "run", *options, LAUNCHER=launcher)
    job.reached(5)
    stop(job)
    assert job.ended_as(alone) >= 1
    if stop is warn:
        assert "asking the trainer to save" in job.said() and "interrupted: requeued" in job.said()


def test_cancelled_it_saves_and_is_not_requeued(cgroup_cluster, digits, tmp_path):
    job = Job(cgroup_cluster, digits, tmp_path / "run", "--nodes=2", LAUNCHER="accelerate")
    job.reached(2)
    cgroup_cluster.run("scancel", job.number)
    assert job.ended("CANCELLED")["Restarts"] == "0"
    wait_until(lambda: status(job.run)["status"] != "running", 30, job.said)
    assert status(job.run)["status"] == "interrupted", job.said()
    assert status(job.run)["step"] >= 2 and (job.run / "checkpoints" / "latest").exists()
    assert "ended from outside: not requeued" in job.said()


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


AGENT = """#!/bin/sh
# stands for Python, as the agent of a sweep: `-m wandb agent --count 1 SWEEP` starts the trial
shift 5
{python} -m vae_dist.train {overrides}
"""


def test_a_preempted_trial_of_a_sweep_saves_and_goes_on(cgroup_cluster, digits, tmp_path):
    agent, run = tmp_path / "agent", tmp_path / "run"
    overrides = " ".join(arguments(run, digits, *OPTIONS))
    agent.write_text(AGENT.format(python=sys.executable, overrides=overrides))
    agent.chmod(0o755)
    sweep = {"PYTHON": str(agent), "SWEEP": "team/project/id"}
    job = Job(cgroup_cluster, digits, run, "--array=7", script="sweep", **sweep)
    job.number += "_7"
    job.reached(5)
    warn(job)
    assert job.ended("COMPLETED")["Restarts"] == "1"
    assert "asking the trial to save" in job.said() and "going on at step" in job.said()
    assert status(run)["status"] == "finished" and sorted(rows(run)) == [*range(1, STEPS + 1)]


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
