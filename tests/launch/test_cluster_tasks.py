"""The same where signals reach the task alone, which passes them on to its trainers."""

import sys

import pytest

from tests.support.slurm.cluster import OPTIONS, STEPS, TWO_BY_ONE, Job, preempt, wait_until, warn
from tests.support.training import arguments, rows, status

pytestmark = pytest.mark.slow


def test_preempted_it_saves_goes_on_and_ends_the_same(cgroup_cluster, digits, tmp_path, alone):
    options = ("--partition=spot", *TWO_BY_ONE)
    job = Job(cgroup_cluster, digits, tmp_path / "run", *options, LAUNCHER="accelerate")
    job.reached(5)
    preempt(job)
    assert job.ended_as(alone) >= 1


def test_cancelled_it_saves_and_is_not_requeued(cgroup_cluster, digits, tmp_path):
    job = Job(cgroup_cluster, digits, tmp_path / "run", "--nodes=2", LAUNCHER="accelerate")
    job.reached(2)
    cgroup_cluster.run("scancel", job.number)
    assert job.ended("CANCELLED")["Restarts"] == "0"
    wait_until(lambda: status(job.run)["status"] != "running", 30, job.said)
    assert status(job.run)["status"] == "interrupted", job.said()
    assert status(job.run)["step"] >= 2 and (job.run / "checkpoints" / "latest").exists()
    assert "ended from outside: not requeued" in job.said()


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
