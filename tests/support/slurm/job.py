"""Real training under launch/*.sbatch on a throw-away cluster."""

import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.slurm.cluster import ROOT, Cluster, has_freezer, lacking
from tests.support.training import arguments, rows, same_weights, status, train

STEPS = 250  # seconds: a signal finds the run still training
TWO_BY_ONE = ("--nodes=2", "--ntasks-per-node=1")


def started(proctrack):
    """A cluster; `proctrack` says whom signals reach (up.sh). For fixtures."""
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
        options = ("--cpus-per-task=2", "--time=10", f"--output={self.output}", *options)
        words = [*options, f"launch/{script}.sbatch", *training_keys(digits, run), *overrides]
        variables = {"OMP_NUM_THREADS": "1", **variables}
        self.number = cluster.run("sbatch", "--parsable", *words, **variables).strip()

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

    def ended_as(self, alone):
        """Bit for bit as the run folder `alone` did; how often the job was started again."""
        restarts = int(self.ended("COMPLETED")["Restarts"])
        assert ("going on at step" in self.said()) == (restarts > 0)
        ended = status(self.run)
        expected = ["finished", STEPS, "all steps are done"]
        assert [ended[key] for key in ("status", "step", "reason")] == expected
        assert numbers(self.run) == numbers(alone) and same_weights(self.run, alone, STEPS)
        return restarts


def left_alone(digits, folder):
    """The run of two processes of this machine that nothing stops."""
    assert train(folder / "run", digits, *OPTIONS, world=2) == [0, 0]
    return folder / "run"


OPTIONS = ("data.slots=16", f"training.steps={STEPS}", "evaluation.every=0", "checkpoint.every=0")


def training_keys(digits, run):
    return arguments(run, digits, *OPTIONS)


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


def warn(job):
    """As --signal=B:USR1@N does before the time limit."""
    job.cluster.run("scancel", "--signal=USR1", "--batch", job.number)


def preempt(job):
    """A job of the higher partition takes both nodes for a moment."""
    job.cluster.run("srun", "--partition=main", "--nodes=2", "--ntasks=16", "sleep", "1")
