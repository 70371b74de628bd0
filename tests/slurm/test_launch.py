"""The launch scripts on a real SLURM: every way in which a job can end, with real training.

A run that was stopped in whatever way and went on must end as the run that nobody touched: on two
processes bit for bit; on four to rounding, because DDP sums in another order in its first step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.slurm.cluster import ROOT, Cluster
from tests.support.training import arguments, rows, same_weights, status

pytestmark = pytest.mark.slow

STEPS = 250  # seconds: a signal finds the run still training
SAME_STEPS = 50  # over which runs on other numbers of processes agree to 1e-4
TWO_BY_ONE = ("--nodes=2", "--ntasks-per-node=1")
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")


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
    """The run that nobody stops."""
    job = submit(linuxproc, digits, tmp_path_factory.mktemp("untouched") / "run", *TWO_BY_TWO)
    job.ended("COMPLETED")
    yield job


@pytest.fixture(scope="module")
def untouched_pair(
    linuxproc: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Job]:
    """The same on one process a node."""
    job = submit(linuxproc, digits, tmp_path_factory.mktemp("pair") / "run", *TWO_BY_ONE)
    job.ended("COMPLETED")
    yield job


def numbers(job: Job) -> list[dict[str, float]]:
    """All that was logged of each step but what depends on the machine."""
    found = rows(job.run)
    assert sorted(found) == list(range(1, STEPS + 1))
    return [
        {
            key: value
            for key, value in found[step].items()
            if not key.startswith(("time/", "system/"))
        }
        for step in sorted(found)
    ]


def assert_close(job: Job, untouched: Job) -> None:
    assert status(job.run)["status"] == "finished"
    ours, theirs = numbers(job), numbers(untouched)
    for mine, other in zip(ours[:SAME_STEPS], theirs[:SAME_STEPS], strict=True):
        for key in ("train/loss", "train/rate_nats", "optim/grad_norm"):
            assert mine[key] == pytest.approx(other[key], rel=1e-4), (mine["step"], key)
    figures = [run[-1]["eval/neg_elbo_nats"] for run in (ours, theirs)]
    assert figures[0] == pytest.approx(figures[1], rel=5e-3)


def assert_equal(job: Job, untouched: Job) -> None:
    assert status(job.run)["status"] == "finished"
    assert numbers(job) == numbers(untouched)
    assert same_weights(job.run, untouched.run, STEPS)


def went_on(job: Job) -> None:
    """The second start did not begin anew."""
    assert "going on at step" in job.trainer_said()


# tasks: one srun task a process


def test_a_run_on_two_nodes_finishes(untouched: Job) -> None:
    said = status(untouched.run)
    assert [said[key] for key in ("status", "step", "reason")] == [
        "finished",
        STEPS,
        "all steps are done",
    ]
    logs = sorted(path.name for path in (untouched.run / "logs").iterdir())
    assert logs == [f"{untouched.number}-n1.log", f"{untouched.number}-n2.log"]
    said = untouched.trainer_said()
    assert "on n1: rank 0 cpu, rank 1 cpu" in said and "on n2: rank 2 cpu, rank 3 cpu" in said


def test_four_processes_train_what_two_train(untouched: Job, untouched_pair: Job) -> None:
    assert_close(untouched_pair, untouched)


def test_warned_of_the_time_limit_it_saves_goes_on_and_ends_the_same(
    linuxproc: Cluster, digits: Path, tmp_path: Path, untouched_pair: Job
) -> None:
    job = submit(linuxproc, digits, tmp_path / "run", *TWO_BY_ONE)
    job.reached(5)
    linuxproc.run("scancel", "--signal=USR1", "--batch", job.number)  # as --signal=B:USR1@N does
    assert job.ended("COMPLETED")["Restarts"] == "1"
    assert "asking the trainer to save" in job.said() and "interrupted: requeued" in job.said()
    went_on(job)
    assert_equal(job, untouched_pair)


def test_at_its_time_limit_it_saves_and_goes_on(
    linuxproc: Cluster, digits: Path, tmp_path: Path
) -> None:
    """A limit of one minute, watched by SLURM itself, which looks every half minute or so."""
    job = submit(
        linuxproc,
        digits,
        tmp_path / "run",
        *TWO_BY_ONE,
        "--time=1",
        "--signal=B:USR1@20",
        overrides=("training.steps=1000000",),
    )
    job.reached(1)
    job.waits()
    assert "asking the trainer to save" in job.said() and "interrupted: requeued" in job.said()
    saved = status(job.run)["step"]
    assert status(job.run)["status"] == "interrupted" and saved > 0
    linuxproc.release(job.number)
    job.reached(saved + 1)
    went_on(job)
    linuxproc.run("scancel", job.number)
    job.ended("CANCELLED")


def preempt(job: Job) -> None:
    """A job of the higher partition takes both nodes for a moment."""
    job.cluster.run("srun", "--partition=main", "--nodes=2", "--ntasks=16", "sleep", "1")


def test_preempted_it_saves_goes_on_and_ends_the_same(
    linuxproc: Cluster, digits: Path, tmp_path: Path, untouched_pair: Job
) -> None:
    job = submit(linuxproc, digits, tmp_path / "run", "--partition=spot", *TWO_BY_ONE)
    job.reached(5)
    preempt(job)
    assert job.ended("COMPLETED")["Restarts"] == "1"
    went_on(job)
    assert_equal(job, untouched_pair)


@pytest.mark.parametrize("launcher", ["tasks", "accelerate"])
def test_cancelled_it_saves_and_is_not_requeued(
    request: pytest.FixtureRequest, digits: Path, tmp_path: Path, launcher: str
) -> None:
    cluster = request.getfixturevalue("linuxproc" if launcher == "tasks" else "cgroup")
    job = submit(cluster, digits, tmp_path / "run", "--nodes=2", LAUNCHER=launcher)
    job.reached(2)
    cluster.run("scancel", job.number)
    assert job.ended("CANCELLED")["Restarts"] == "0"
    end = time.monotonic() + 30
    while status(job.run)["status"] == "running" and time.monotonic() < end:
        time.sleep(0.1)
    assert status(job.run)["status"] == "interrupted", job.said() + job.trainer_said()
    assert status(job.run)["step"] >= 2
    assert "ended from outside: not requeued" in job.said(), job.said()
    assert (job.run / "checkpoints" / "latest").exists()
    assert cluster.job(job.number)["JobState"] == "CANCELLED"


@pytest.mark.parametrize("node", ["n1", "n2"])  # n1 runs the batch script and rank 0
def test_a_dead_node_gives_the_job_back_to_the_queue_and_it_ends_the_same(
    linuxproc: Cluster, digits: Path, tmp_path: Path, untouched_pair: Job, node: str
) -> None:
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
    assert_equal(job, untouched_pair)


# accelerate launch: one task a node


def test_accelerate_on_each_node_warned_of_the_time_limit_ends_the_same(
    cgroup: Cluster, digits: Path, tmp_path: Path, untouched: Job
) -> None:
    job = submit(cgroup, digits, tmp_path / "run", *TWO_BY_TWO, LAUNCHER="accelerate")
    job.reached(5)
    cgroup.run("scancel", "--signal=USR1", "--batch", job.number)
    assert job.ended("COMPLETED")["Restarts"] == "1"
    went_on(job)
    assert_close(job, untouched)


def test_accelerate_on_each_node_preempted_ends_the_same(
    cgroup: Cluster, digits: Path, tmp_path: Path, untouched_pair: Job
) -> None:
    job = submit(cgroup, digits, tmp_path / "run", "-p", "spot", *TWO_BY_ONE, LAUNCHER="accelerate")
    job.reached(5)
    preempt(job)
    assert job.ended("COMPLETED")["Restarts"] == "1"
    went_on(job)
    assert_equal(job, untouched_pair)


# one process


def test_restarts_are_bounded(linuxproc: Cluster, digits: Path, tmp_path: Path) -> None:
    job = submit(linuxproc, digits, tmp_path / "run", MAX_RESTARTS="0")
    job.reached(1)
    linuxproc.run("scancel", "--signal=USR1", "--batch", job.number)
    assert job.ended("FAILED")["ExitCode"] == "75:0"
    assert "MAX_RESTARTS" in job.said() and status(job.run)["status"] == "interrupted"


def test_a_stop_file_ends_the_job_for_good(
    linuxproc: Cluster, digits: Path, tmp_path: Path
) -> None:
    job = submit(linuxproc, digits, tmp_path / "run")
    job.reached(1)
    (job.run / "STOP").write_text("")
    fields = job.ended("FAILED")
    assert fields["ExitCode"] == "75:0" and fields["Restarts"] == "0"
    assert "not requeued" in job.said() and status(job.run)["status"] == "interrupted"


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


def test_missing_shards_fail_with_the_reason_in_the_output(
    linuxproc: Cluster, digits: Path, tmp_path: Path
) -> None:
    job = submit(linuxproc, digits, tmp_path / "run", overrides=("data.train=nowhere",))
    assert job.ended("FAILED")["ExitCode"] == "2:0"
    assert "data.train=nowhere" in job.said()


def test_srun_without_a_launch_script_is_refused(linuxproc: Cluster) -> None:
    said = linuxproc.run(
        "srun",
        "--ntasks=2",
        "bash",
        "-c",
        f"PYTHONPATH={ROOT} {sys.executable} -m vae_dist.train config=debug 2>&1; echo code $?",
    )
    assert said.count("each task would train alone") == 2 and said.count("code 2") == 2


def test_each_task_of_an_array_packs_its_part(linuxproc: Cluster, tmp_path: Path) -> None:
    """The command line alone: `echo` stands for Python."""
    output = tmp_path / "pack-%a.out"
    job = linuxproc.submit(
        "--array=0-2",
        "--cpus-per-task=1",
        f"--output={output}",
        script="launch/pack.sbatch",
        args=["source=a folder", "out=b"],
        variables={"PYTHON": "echo"},
    )
    for task in (0, 1, 2):
        linuxproc.wait(f"{job}_{task}")
        said = (tmp_path / f"pack-{task}.out").read_text()
        assert said == f"-m vae_dist.pack source=a folder out=b shard_range={task}/3\n"


def test_each_task_of_an_array_asks_for_a_trial_of_a_sweep(
    linuxproc: Cluster, tmp_path: Path
) -> None:
    output = tmp_path / "sweep.out"
    job = linuxproc.submit(
        "--array=7",
        f"--output={output}",
        script="launch/sweep.sbatch",
        args=[],
        variables={"PYTHON": "echo", "SWEEP": "team/project/id"},
    )
    linuxproc.wait(f"{job}_7")
    assert output.read_text() == "-m wandb agent --count 1 team/project/id\n"


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


def test_a_sweep_without_a_config_says_what_to_type(linuxproc: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "sweep.out"
    job = linuxproc.submit(
        "--array=0", f"--output={output}", script="launch/sweep.sbatch", args=[], variables={}
    )
    assert linuxproc.wait(f"{job}_0", timeout_s=20)["ExitCode"] == "2:0"
    assert "launch/sweep.sbatch config=NAME" in output.read_text()


@pytest.mark.parametrize("script", ["slurm", "sweep", "pack"])
def test_sbatch_accepts_the_script(linuxproc: Cluster, script: str) -> None:
    linuxproc.run("sbatch", "--test-only", f"launch/{script}.sbatch", "config=debug")
