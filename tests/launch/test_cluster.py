"""The launch scripts on a real SLURM: every way in which a job can end, with real training.

A run on two processes that was stopped in whatever way and went on ends bit for bit as the run that
was left alone. What the script decides without a cluster is in test_scripts.
"""

import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.slurm.cluster import ROOT, Cluster, has_freezer, lacking
from tests.support.training import arguments, rows, same_weights, status

pytestmark = pytest.mark.slow

STEPS = 250  # seconds: a signal finds the run still training
TWO_BY_ONE = ("--nodes=2", "--ntasks-per-node=1")


def started(proctrack):
    if lacks := lacking():
        pytest.skip(f"needs a SLURM cluster, but this machine lacks {lacks}")
    if proctrack == "cgroup" and not has_freezer():
        pytest.skip("needs the cgroup v1 freezer")
    # Not under pytest's own folder: a socket's path is at most 108 characters long.
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        Path(folder).chmod(0o755)  # munge asks for it
        lab = Path(folder) / Path(folder).name  # its name also names the network namespaces
        with Cluster(lab, PROCTRACK=proctrack, KILL_WAIT="30") as cluster:
            yield cluster


@pytest.fixture(scope="module")
def linuxproc():
    """Signals reach every process of a task."""
    yield from started("linuxproc")


@pytest.fixture(scope="module")
def cgroup():
    """Signals reach the task alone, as on most real clusters."""
    yield from started("cgroup")


def wait_until(is_so, timeout_s, said):
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, said()
        time.sleep(0.05)


class Job:
    """A submitted run, its folder, and what the batch script and the trainer said."""

    def __init__(self, cluster, digits, run, *options, script="slurm", overrides=(), **variables):
        self.cluster, self.run, self.output = cluster, run, run.with_suffix(".out")
        variables = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **variables}
        self.number = cluster.submit(
            *("--cpus-per-task=2", "--time=10", f"--output={self.output}", *options),
            script=f"launch/{script}.sbatch",
            args=[*training_keys(digits, run), *overrides],
            variables={"OMP_NUM_THREADS": "1", **variables},
        )

    def said(self):
        paths = [self.output, *sorted((self.run / "logs").glob("*"))]
        return "".join(path.read_text() for path in paths if path.exists())

    def reached(self, step):
        def has_row():
            state = self.cluster.job(self.number)["JobState"]
            assert state in ("PENDING", "RUNNING"), self.said()
            log = self.run / "log.jsonl"
            return log.exists() and f'"step": {step},' in log.read_text()

        wait_until(has_row, 180, self.said)

    def ended(self, state):
        fields = self.cluster.wait(self.number)
        assert fields["JobState"] == state, self.said()
        return fields

    def ended_as(self, untouched):
        """At its second start it did not begin anew, and its numbers are those of the other."""
        assert int(self.ended("COMPLETED")["Restarts"]) >= 1
        assert "going on at step" in self.said()
        assert status(self.run)["status"] == "finished"
        assert numbers(self.run) == numbers(untouched.run)
        assert same_weights(self.run, untouched.run, STEPS)


def training_keys(digits, run):
    fixed = (f"training.steps={STEPS}", "evaluation.every=0", "checkpoint.every=0")
    return arguments(run, digits, "data.slots=16", *fixed)


def numbers(run):
    """All that was logged of each step but what depends on the machine."""
    found = rows(run)
    assert sorted(found) == list(range(1, STEPS + 1))
    of_machine = ("time/", "system/")
    return {
        (step, key): value
        for step, row in found.items()
        for key, value in row.items()
        if not key.startswith(of_machine)
    }


@pytest.fixture(scope="module")
def untouched(linuxproc, digits, tmp_path_factory):
    """The run that is not stopped, on one process of each of two nodes."""
    job = Job(linuxproc, digits, tmp_path_factory.mktemp("untouched") / "run", *TWO_BY_ONE)
    job.ended("COMPLETED")
    return job


def test_a_run_on_two_nodes_finishes(untouched):
    ended = status(untouched.run)
    expected = ["finished", STEPS, "all steps are done"]
    assert [ended[key] for key in ("status", "step", "reason")] == expected
    logs = sorted(path.name for path in (untouched.run / "logs").iterdir())
    assert logs == [f"{untouched.number}-n1.log", f"{untouched.number}-n2.log"]
    said = untouched.said()
    assert "on n1: rank 0 cpu" in said and "on n2: rank 1 cpu" in said


def warn(job):
    """As --signal=B:USR1@N does before the time limit."""
    job.cluster.run("scancel", "--signal=USR1", "--batch", job.number)


def preempt(job):
    """A job of the higher partition takes both nodes for a moment."""
    job.cluster.run("srun", "--partition=main", "--nodes=2", "--ntasks=16", "sleep", "1")


@pytest.mark.parametrize(
    ("cluster", "stop", "partition", "variables"),
    [
        ("linuxproc", warn, "main", {}),
        ("linuxproc", preempt, "spot", {}),
        ("cgroup", preempt, "spot", {"LAUNCHER": "accelerate"}),  # one task a node
    ],
)
def test_stopped_from_outside_it_saves_goes_on_and_ends_the_same(
    request, digits, tmp_path, untouched, cluster, stop, partition, variables
):
    on, options = request.getfixturevalue(cluster), (f"--partition={partition}", *TWO_BY_ONE)
    job = Job(on, digits, tmp_path / "run", *options, **variables)
    job.reached(5)
    stop(job)
    job.ended_as(untouched)
    if stop is warn:
        assert "asking the trainer to save" in job.said() and "interrupted: requeued" in job.said()


def test_cancelled_it_saves_and_is_not_requeued(cgroup, digits, tmp_path):
    job = Job(cgroup, digits, tmp_path / "run", "--nodes=2", LAUNCHER="accelerate")
    job.reached(2)
    cgroup.run("scancel", job.number)
    assert job.ended("CANCELLED")["Restarts"] == "0"
    wait_until(lambda: status(job.run)["status"] != "running", 30, job.said)
    assert status(job.run)["status"] == "interrupted", job.said()
    assert status(job.run)["step"] >= 2 and (job.run / "checkpoints" / "latest").exists()
    assert "ended from outside: not requeued" in job.said()
    assert cgroup.job(job.number)["JobState"] == "CANCELLED"


def test_a_dead_node_gives_the_job_back_to_the_queue_and_it_ends_the_same(
    linuxproc, digits, tmp_path, untouched
):
    node = "n1"  # runs the batch script and rank 0
    often = ("checkpoint.every=5",)
    job = Job(linuxproc, digits, tmp_path / "run", *TWO_BY_ONE, overrides=often)
    job.reached(7)
    # a thread writes the checkpoint; without one it rightly begins anew
    wait_until((job.run / "checkpoints" / "latest").exists, 60, job.said)
    linuxproc.kill_node(node)
    linuxproc.wait_for_requeue(job.number)
    linuxproc.boot(node)
    job.ended_as(untouched)


def test_an_array_trains_one_run_a_seed(linuxproc, digits, tmp_path):
    few = ("training.steps=3",)
    job = Job(linuxproc, digits, tmp_path / "runs", "--array=3,5", script="sweep", overrides=few)
    first_losses = set()
    for seed in (3, 5):
        linuxproc.wait(f"{job.number}_{seed}")
        run = job.run / f"seed_{seed}"
        assert status(run)["status"] == "finished", job.said()
        first_losses.add(rows(run)[1]["train/loss"])
    assert len(first_losses) == 2


# what costs seconds and trains nothing

WRONG = [
    ("", "optimizer.lrr=1", "", "did you mean optimizer.lr"),
    ("--nodes=2 --ntasks-per-node=3", "", "", "6 processes cannot share data.slots=16"),
    ("--gpus-per-node=2", "", "", "submit with --ntasks-per-node=2"),
    ("--nodes=2 --ntasks=3 --ntasks-per-node=2", "", "", "leave --ntasks out"),
    ("", "", "LAUNCHER=mpirun", "LAUNCHER=mpirun is neither tasks nor accelerate"),
    ("--nodes=2", "", "HEAD_ADDR=nowhere", "nowhere is not resolved on every node"),
    ("", "", "ACTIVATE=module load nothing", "module: command not found"),
]


def test_a_wrong_submission_fails_in_seconds_with_the_reason(linuxproc, digits, tmp_path):
    jobs = []
    for number, (options, overrides, setting, message) in enumerate(WRONG):
        variables = dict([setting.split("=")] if setting else [])
        more = {"overrides": overrides.split(), **variables}
        run = tmp_path / f"run{number}"
        jobs.append((Job(linuxproc, digits, run, *options.split(), **more), message))
    for job, message in jobs:
        assert linuxproc.wait(job.number, timeout_s=40)["ExitCode"] == "2:0", job.said()
        assert message in job.said() and not job.run.exists()


def test_srun_without_a_launch_script_is_refused(linuxproc):
    command = f"PYTHONPATH={ROOT} {sys.executable} -m vae_dist.train config=debug 2>&1"
    said = linuxproc.run("srun", "--ntasks=2", "bash", "-c", f"{command}; echo code $?")
    assert said.count("each task would train alone") == 2 and said.count("code 2") == 2


AGENT = """#!/bin/sh
# stands for Python, as the agent of a sweep: `-m wandb agent --count 1 SWEEP` starts the trial
shift 5
{python} -m vae_dist.train {overrides}
"""


def test_a_preempted_trial_of_a_sweep_saves_and_goes_on(cgroup, digits, tmp_path):
    agent, run = tmp_path / "agent", tmp_path / "run"
    overrides = " ".join(training_keys(digits, run))
    agent.write_text(AGENT.format(python=sys.executable, overrides=overrides))
    agent.chmod(0o755)
    sweep = {"PYTHON": str(agent), "SWEEP": "team/project/id"}
    job = Job(cgroup, digits, run, "--array=7", script="sweep", **sweep)
    job.number += "_7"
    job.reached(5)
    warn(job)
    assert job.ended("COMPLETED")["Restarts"] == "1"
    assert "asking the trial to save" in job.said() and "going on at step" in job.said()
    assert status(run)["status"] == "finished" and sorted(rows(run)) == [*range(1, STEPS + 1)]


@pytest.mark.parametrize("script", ["slurm", "sweep", "pack"])
def test_sbatch_accepts_the_script(linuxproc, script):
    linuxproc.run("sbatch", "--test-only", f"launch/{script}.sbatch", "config=debug")
