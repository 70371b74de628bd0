"""What the batch scripts decide; srun, scontrol and Python are stand-ins, in test_cluster real."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SRUN = """#!/bin/bash
case $* in
  *checked_config*) echo "$RUN" ;;
  *--overlap*) ;;
  *) [[ -z $WARNED ]] || { kill -USR1 $PPID; /bin/sleep 0.05; }
     said="{\\"status\\": \\"$STATUS\\", \\"reason\\": \\"$REASON\\"}"
     [[ -z $STATUS ]] || echo "$said" >"$RUN/status.json"
     echo x >"$RUN/logs/7-n.log"
     exit "$CODE" ;;
esac
"""
SCONTROL = """#!/bin/bash
[[ $1 != show ]] || { echo "   PreemptEligibleTime=None PreemptTime=$PREEMPTED"; exit; }
echo "$*" >>"$RUN/scontrol"
kill -KILL $PPID
"""


def submit(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", "#!/bin/bash\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RUN": str(tmp_path / "run"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n",
        "SLURM_NNODES": "1",
        "STATUS": "",
        "REASON": "",
        "CODE": "0",
        "WARNED": "",
        "PREEMPTED": "None",
        **variables,
    }
    script = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "config=debug"]
    return subprocess.run(script, env=job, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("status", "code", "is_requeued"),
    [
        ("interrupted", "75", True),
        ("interrupted", "1", True),  # an elastic agent
        ("", "75", True),  # while it waited for the lock of a host that died
        ("", "143", False),  # srun ends the other tasks when one fails
        ("running", "143", False),
        ("failed", "143", False),
        ("failed", "138", False),
        ("", "2", False),
        ("failed", "1", False),
    ],
)
def test_who_is_requeued(tmp_path: Path, status: str, code: str, is_requeued: bool) -> None:
    done = submit(tmp_path, SLURM_NTASKS_PER_NODE="1", STATUS=status, CODE=code)
    asked = tmp_path / "run" / "scontrol"
    assert asked.exists() == is_requeued, done.stdout + done.stderr
    assert is_requeued or done.returncode == int(code)


@pytest.mark.parametrize("signs", [{"WARNED": "1"}, {"PREEMPTED": "2026-01-02T03:04:05"}])
@pytest.mark.parametrize(
    ("status", "code", "is_requeued"),
    [("", "143", True), ("", "138", True), ("running", "143", True), ("failed", "143", False)],
)
def test_after_a_warning_a_task_that_a_signal_ended_is_requeued(
    tmp_path: Path, signs: dict[str, str], status: str, code: str, is_requeued: bool
) -> None:
    done = submit(tmp_path, SLURM_NTASKS_PER_NODE="1", STATUS=status, CODE=code, **signs)
    assert (tmp_path / "run" / "scontrol").exists() == is_requeued, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MAX_RESTARTS": "3", "SLURM_RESTART_COUNT": "3"}, "restarted 3 times (MAX_RESTARTS)"),
        ({"REASON": "runs/a/STOP exists"}, "not requeued; submit it again to go on"),
    ],
)
def test_an_interrupted_run_that_is_not_requeued_ends_with_75(
    tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    ended = {"STATUS": "interrupted", "CODE": "75", "SLURM_NTASKS_PER_NODE": "1"}
    done = submit(tmp_path, **ended, **variables)
    assert done.returncode == 75 and words in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "run" / "scontrol").exists()


def test_a_sweep_without_a_config_says_what_to_type(tmp_path: Path) -> None:
    job = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)}
    script = ["bash", str(ROOT / "launch" / "sweep.sbatch")]
    done = subprocess.run(script, env=job, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "launch/sweep.sbatch config=NAME" in done.stderr


def test_tasks_without_their_number_a_node_are_refused_with_the_option(tmp_path: Path) -> None:
    done = submit(tmp_path)
    assert done.returncode != 0
    assert "submit with --ntasks-per-node=N" in done.stderr


@pytest.mark.parametrize(
    ("task", "count", "parts", "shard_range"),
    [
        ("0", "8", "", "0/8"),
        ("7", "8", "", "7/8"),
        ("3", "1", "8", "3/8"),  # --array=3: this one again
        ("5", "2", "8", "5/8"),  # --array=3,5
        ("3", "1", "", None),
        ("8", "8", "", None),  # --array=1-8, or 0-14:2
        ("8", "1", "8", None),
    ],
)
def test_a_task_packs_the_part_of_its_number(
    tmp_path: Path, task: str, count: str, parts: str, shard_range: str | None
) -> None:
    job = {
        "PATH": os.environ["PATH"],
        "PYTHON": "echo",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_ARRAY_TASK_ID": task,
        "SLURM_ARRAY_TASK_COUNT": count,
        "PARTS": parts,
    }
    script = ["bash", str(ROOT / "launch" / "pack.sbatch"), "source=a", "out=b"]
    done = subprocess.run(script, env=job, capture_output=True, text=True, timeout=60)
    if shard_range is None:
        assert done.returncode == 2 and "set PARTS to the number of all" in done.stderr
    else:
        assert done.stdout == f"-m vae_dist.pack source=a out=b shard_range={shard_range}\n"
