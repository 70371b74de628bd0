"""A real two-node SLURM inside this machine, for tests of the launch scripts.

`lacking()` says what the machine lacks for it. The cluster starts in a second, is reachable only
through the commands in its folder, and is stopped by the numbers of the processes that it started.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def lacking():
    """What this machine lacks for a cluster, or an empty string."""
    return subprocess.run(
        ["bash", HERE / "lacks.sh"], capture_output=True, text=True
    ).stdout.strip()


def has_freezer():
    """Whether SLURM can follow a job's processes by cgroup (version 1) here."""
    return os.access("/sys/fs/cgroup/freezer/cgroup.procs", os.W_OK)


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
        done = subprocess.run(
            [self.folder / "bin" / tool, *args],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | variables,
        )
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
