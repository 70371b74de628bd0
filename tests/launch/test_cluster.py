"""The launch scripts on a real SLURM: every way in which a job can end, with real training.

A run on two processes that was stopped in whatever way and went on ends bit for bit as the run that
was left alone. What the script decides without a cluster is in tests/launch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.slurm.cluster import ROOT, Cluster
from tests.support.training import arguments, rows, same_weights, status

pytestmark = pytest.mark.slow

STEPS = 250  # seconds: a signal finds the run still training
TWO_BY_ONE = ("--nodes=2", "--ntasks-per-node=1")


@dataclass
class Job:
    """A submitted run, its folder, and what the batch script said."""

    cluster: Cluster
    number: str
    run: Path
    output: Path

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def trainer_said(self) -> str:
        return "".join(path.read_text() for path in sorted((self.run / "logs").iterdir()))

    def reached(self, step: int) -> None:
        """Wait for a row of that step."""
        end = time.monotonic() + 180
        log = self.run / "log.jsonl"
        while not (log.exists() and f'"step": {step},' in log.read_text()):
            state = self.cluster.job(self.number)["JobState"]
            assert time.monotonic() < end and state in ("PENDING", "RUNNING"), self.said()
            time.sleep(0.1)

    def saved(self) -> None:
        """Wait for a checkpoint, which a thread writes while training goes on."""
        end = time.monotonic() + 60
        while not (self.run / "checkpoints" / "latest").exists():
            assert time.monotonic() < end, self.trainer_said()
            time.sleep(0.05)

    def waits(self) -> None:
        """Wait until it is queued again."""
        self.cluster.wait_for_requeue(self.number)

    def ended(self, state: str) -> dict[str, str]:
        fields = self.cluster.wait(self.number)
        assert fields["JobState"] == state, self.said() + self.trainer_said()
        return fields


def training_keys(digits: Path, run: Path) -> list[str]:
    return arguments(
        run,
        digits,
        "data.slots=16",
        "training.batch_size=16",
        f"training.steps={STEPS}",
        "evaluation.every=0",
        "log.num_images=4",
        "checkpoint.every=0",
    )


def submit(
    cluster: Cluster,
    digits: Path,
    run: Path,
    *options: str,
    script: str = "slurm",
    overrides: tuple[str, ...] = (),
    **variables: str,
) -> Job:
    output = run.with_suffix(".out")
    number = cluster.submit(
        "--cpus-per-task=2",
        "--time=10",
        f"--output={output}",
        *options,
        script=f"launch/{script}.sbatch",
        args=[*training_keys(digits, run), *overrides],
        variables={
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **variables,
        },
    )
    return Job(cluster, number, run, output)


@pytest.fixture(scope="module")
def untouched(
    linuxproc: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Job]:
    """The run that is not stopped, on one process of each of two nodes."""
    job = submit(linuxproc, digits, tmp_path_factory.mktemp("untouched") / "run", *TWO_BY_ONE)
    job.ended("COMPLETED")
    yield job


def numbers(job: Job) -> list[dict[str, float]]:
    """All that was logged of each step but what depends on the machine."""
    found = rows(job.run)
    assert sorted(found) == list(range(1, STEPS + 1))
    of_machine = ("time/", "system/")
    return [
        {key: value for key, value in found[step].items() if not key.startswith(of_machine)}
        for step in sorted(found)
    ]


def assert_equal(job: Job, untouched: Job) -> None:
    assert status(job.run)["status"] == "finished"
    assert numbers(job) == numbers(untouched)
    assert same_weights(job.run, untouched.run, STEPS)


def went_on(job: Job) -> None:
    """The second start did not begin anew."""
    assert "going on at step" in job.trainer_said()


# tasks: one srun task a process


def test_a_run_on_two_nodes_finishes(untouched: Job) -> None:
    ended = status(untouched.run)
    assert [ended[key] for key in ("status", "step")] == ["finished", STEPS]
    assert ended["reason"] == "all steps are done"
    logs = sorted(path.name for path in (untouched.run / "logs").iterdir())
    assert logs == [f"{untouched.number}-n1.log", f"{untouched.number}-n2.log"]
    said = untouched.trainer_said()
    assert "on n1: rank 0 cpu" in said and "on n2: rank 1 cpu" in said


def warn(job: Job) -> None:
    """As --signal=B:USR1@N does before the time limit."""
    job.cluster.run("scancel", "--signal=USR1", "--batch", job.number)


def preempt(job: Job) -> None:
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
    request: pytest.FixtureRequest,
    digits: Path,
    tmp_path: Path,
    untouched: Job,
    cluster: str,
    stop: Callable[[Job], None],
    partition: str,
    variables: dict[str, str],
) -> None:
    options = (f"--partition={partition}", *TWO_BY_ONE)
    on = request.getfixturevalue(cluster)
    job = submit(on, digits, tmp_path / "run", *options, **variables)
    job.reached(5)
    stop(job)
    assert job.ended("COMPLETED")["Restarts"] == "1"
    if stop is warn:
        assert "asking the trainer to save" in job.said() and "interrupted: requeued" in job.said()
    went_on(job)
    assert_equal(job, untouched)


def test_cancelled_it_saves_and_is_not_requeued(
    cgroup: Cluster, digits: Path, tmp_path: Path
) -> None:
    job = submit(cgroup, digits, tmp_path / "run", "--nodes=2", LAUNCHER="accelerate")
    job.reached(2)
    cgroup.run("scancel", job.number)
    assert job.ended("CANCELLED")["Restarts"] == "0"
    end = time.monotonic() + 30
    while status(job.run)["status"] == "running" and time.monotonic() < end:
        time.sleep(0.1)
    assert status(job.run)["status"] == "interrupted", job.said() + job.trainer_said()
    assert status(job.run)["step"] >= 2
    assert "ended from outside: not requeued" in job.said(), job.said()
    assert (job.run / "checkpoints" / "latest").exists()
    assert cgroup.job(job.number)["JobState"] == "CANCELLED"


def test_a_dead_node_gives_the_job_back_to_the_queue_and_it_ends_the_same(
    linuxproc: Cluster, digits: Path, tmp_path: Path, untouched: Job
) -> None:
    node = "n1"  # runs the batch script and rank 0
    job = submit(
        linuxproc, digits, tmp_path / "run", *TWO_BY_ONE, overrides=("checkpoint.every=5",)
    )
    job.reached(7)
    job.saved()  # else it rightly begins anew
    linuxproc.kill_node(node)
    job.waits()
    linuxproc.boot(node)
    assert int(job.ended("COMPLETED")["Restarts"]) >= 1
    went_on(job)
    assert_equal(job, untouched)


def test_an_array_trains_one_run_a_seed(linuxproc: Cluster, digits: Path, tmp_path: Path) -> None:
    job = submit(linuxproc, digits, tmp_path / "runs", "--array=3,5", script="sweep")
    first_losses = set()
    for seed in (3, 5):
        linuxproc.wait(f"{job.number}_{seed}")
        run = job.run / f"seed_{seed}"
        assert status(run)["status"] == "finished", job.said()
        first_losses.add(rows(run)[1]["train/loss"])
    assert len(first_losses) == 2


# what costs seconds and trains nothing


@pytest.mark.parametrize(
    ("options", "overrides", "variables", "message"),
    [
        ((), ("optimizer.lrr=1",), {}, "did you mean optimizer.lr"),
        (("--nodes=2", "--ntasks-per-node=3"), (), {}, "6 processes cannot share data.slots=16"),
        (("--gpus-per-node=2",), (), {}, "submit with --ntasks-per-node=2"),
        (("--nodes=2", "--ntasks=3", "--ntasks-per-node=2"), (), {}, "leave --ntasks out"),
        ((), (), {"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun is neither tasks nor accelerate"),
        (("--nodes=2",), (), {"HEAD_ADDR": "nowhere"}, "nowhere is not resolved on every node"),
        ((), (), {"ACTIVATE": "module load nothing"}, "module: command not found"),
    ],
)
def test_a_wrong_submission_fails_in_seconds_with_the_reason(
    linuxproc: Cluster,
    digits: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    overrides: tuple[str, ...],
    variables: dict[str, str],
    message: str,
) -> None:
    job = submit(linuxproc, digits, tmp_path / "run", *options, overrides=overrides, **variables)
    assert linuxproc.wait(job.number, timeout_s=20)["ExitCode"] == "2:0", job.said()
    assert message in job.said()
    assert not job.run.exists()


def test_srun_without_a_launch_script_is_refused(linuxproc: Cluster) -> None:
    said = linuxproc.run(
        "srun",
        "--ntasks=2",
        "bash",
        "-c",
        f"PYTHONPATH={ROOT} {sys.executable} -m vae_dist.train config=debug 2>&1; echo code $?",
    )
    assert said.count("each task would train alone") == 2 and said.count("code 2") == 2


AGENT = """#!/bin/sh
# stands for Python, as the agent of a sweep: `-m wandb agent --count 1 SWEEP` starts the trial
shift 5
{python} -m vae_dist.train {overrides}
"""


def test_a_preempted_trial_of_a_sweep_saves_and_goes_on(
    cgroup: Cluster, digits: Path, tmp_path: Path
) -> None:
    agent = tmp_path / "agent"
    run = tmp_path / "run"
    overrides = " ".join(training_keys(digits, run))
    agent.write_text(AGENT.format(python=sys.executable, overrides=overrides))
    agent.chmod(0o755)
    sweep = {"PYTHON": str(agent), "SWEEP": "team/project/id"}
    job = submit(cgroup, digits, run, "--array=7", script="sweep", **sweep)
    job.number += "_7"
    job.reached(5)
    cgroup.run("scancel", "--signal=USR1", "--batch", job.number)
    assert job.ended("COMPLETED")["Restarts"] == "1"
    assert "asking the trial to save" in job.said() and "going on at step" in job.said()
    assert status(run)["status"] == "finished" and sorted(rows(run)) == [*range(1, STEPS + 1)]


@pytest.mark.parametrize("script", ["slurm", "sweep", "pack"])
def test_sbatch_accepts_the_script(linuxproc: Cluster, script: str) -> None:
    linuxproc.run("sbatch", "--test-only", f"launch/{script}.sbatch", "config=debug")
