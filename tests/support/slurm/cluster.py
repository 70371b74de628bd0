"""A real two-node SLURM inside this machine, and real training on it under launch/*.sbatch.

The cluster starts in a second, is reachable only through the commands in its folder, and is stopped
by the numbers of the processes that it started.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tests.support.training import arguments, losses, same_weights, status

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
STEPS = 250  # seconds: a signal finds the run still training
OPTIONS = ("data.slots=16", f"training.steps={STEPS}", "evaluation.every=0", "checkpoint.every=0")
TWO_BY_ONE = ("--nodes=2", "--ntasks-per-node=1")


def started(proctrack):
    """A cluster; `proctrack` says whom signals reach (up.sh). For fixtures."""
    done = subprocess.run(["bash", HERE / "lacks.sh"], capture_output=True, text=True)
    if lacks := done.stdout.strip():
        pytest.skip(f"needs a SLURM cluster, but this machine lacks {lacks}")
    if proctrack == "cgroup" and not os.access("/sys/fs/cgroup/freezer/cgroup.procs", os.W_OK):
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


class Cluster:
    """Two nodes of 8 pretended CPUs and 2 pretended GPUs, n1 and n2. Use as a context manager.

    Partition `main` preempts `spot`. `settings` are the variables of up.sh.
    """

    def __init__(self, folder, **settings):
        self.folder = folder  # short: it holds a socket
        self._settings = settings

    def __enter__(self):
        self._script("up.sh", str(self.folder), **self._settings)
        return self

    def __exit__(self, *exception):
        self._script("down.sh", str(self.folder))

    def _script(self, name, *args, **settings):
        subprocess.run(["bash", HERE / name, *args], check=True, env=os.environ | settings)

    def run(self, tool, *args, **variables):
        """A command on the login node, in the checkout; its standard output."""
        command, pipes = [self.folder / "bin" / tool, *args], {"capture_output": True, "text": True}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, **pipes)
        assert done.returncode == 0, f"{tool} {' '.join(args)}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job):
        """The fields of `scontrol show job`; of the first task of an array."""
        text = self.run("scontrol", "show", "job", job).split("\n\n")[0]
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, job, states=ENDED, *, timeout_s=240):
        """Until the job is in one of the states; the pause of two minutes after a requeue is cut
        short."""
        end = time.monotonic() + timeout_s
        while (fields := self.job(job))["JobState"] not in states:
            assert time.monotonic() < end, f"job {job} after {timeout_s} s: {fields}"
            if fields["JobState"] == "PENDING" and fields["Reason"] == "BeginTime":
                time.sleep(1)  # SLURM takes a start that comes at once for the past
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.2)
        return fields

    def kill_node(self, node):
        """The machine is gone from one moment to the next, with all its processes."""
        os.kill(int((self.folder / "pid" / f"guard-{node}").read_text().split()[0]), signal.SIGKILL)

    def boot(self, node):
        self._script("boot.sh", str(self.folder), node)


class Job:
    """A submitted run, its folder, and what the batch script and the trainer said."""

    def __init__(self, cluster, digits, run, *options, script="slurm", overrides=(), **variables):
        self.cluster, self.run, self.output = cluster, run, run.with_suffix(".out")
        fixed = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        options = ("--cpus-per-task=2", "--time=10", f"--output={self.output}", *options)
        words = [*options, f"launch/{script}.sbatch", *arguments(run, digits, *OPTIONS)]
        words += overrides
        self.number = cluster.run("sbatch", "--parsable", *words, **fixed | variables).strip()

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
        assert (status(self.run)["status"], status(self.run)["step"]) == ("finished", STEPS)
        assert torch.equal(losses(self.run), losses(alone))
        assert same_weights(self.run, alone, STEPS)
        return restarts


def warn(job):
    """As --signal=B:USR1@N does before the time limit."""
    job.cluster.run("scancel", "--signal=USR1", "--batch", job.number)


def preempt(job):
    """A job of the higher partition takes both nodes for a moment."""
    job.cluster.run("srun", "--partition=main", "--nodes=2", "--ntasks=16", "sleep", "1")
