"""What the batch scripts decide; srun, scontrol and Python are stand-ins, in test_cluster real."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "srun": """
case $* in
  *checked_config*) echo "$RUN" ;;
  *--overlap*) ;;
  *) [[ -z $WARNED ]] || { kill -USR1 $PPID; /bin/sleep 0.05; }
     said="{\\"status\\": \\"$STATUS\\", \\"reason\\": \\"$REASON\\"}"
     [[ -z $STATUS ]] || echo "$said" >"$RUN/status.json"
     echo x >"$RUN/logs/7-n.log"
     exit "$CODE" ;;
esac
""",
    "scontrol": """
[[ $1 != show ]] || { echo "   PreemptEligibleTime=None PreemptTime=$PREEMPTED"; exit; }
echo "$*" >>"$RUN/scontrol"
kill -KILL $PPID
""",
    "sleep": "",
}


def run_script(name, arguments, **variables):
    script = ["bash", str(ROOT / "launch" / f"{name}.sbatch"), *arguments]
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)


def submit(tmp_path, **variables):
    """What slurm.sbatch said, and whether it asked for a requeue."""
    programs, run = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}")
        (programs / name).chmod(0o755)
    job = dict.fromkeys(("STATUS", "REASON", "WARNED"), "") | {"CODE": "0", "PREEMPTED": "None"}
    job |= {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n"}
    job |= {"RUN": str(run), "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    done = run_script("slurm", ["config=debug"], **job | {"SLURM_NNODES": "1"} | variables)
    return done, (run / "scontrol").exists()


REQUEUED = "requeued"
WARNED, PREEMPTED = {"WARNED": "1"}, {"PREEMPTED": "2026-01-02T03:04:05"}
OFTEN = {"MAX_RESTARTS": "3", "SLURM_RESTART_COUNT": "3"}


@pytest.mark.parametrize(
    ("status", "code", "signs", "words"),
    [
        ("interrupted", "75", {}, REQUEUED),
        ("interrupted", "1", {}, REQUEUED),  # an elastic agent
        ("", "75", {}, REQUEUED),  # while it waited for the lock of a host that died
        ("", "143", {}, ""),  # srun ends the other tasks when one fails
        ("running", "143", {}, ""),
        ("failed", "143", {}, ""),
        ("", "2", {}, ""),
        ("failed", "1", {}, ""),
        # a task that a signal ended after a warning
        ("", "143", WARNED, REQUEUED),
        ("", "138", PREEMPTED, REQUEUED),
        ("running", "143", PREEMPTED, REQUEUED),
        ("failed", "143", WARNED, ""),
        ("interrupted", "75", OFTEN, "restarted 3 times (MAX_RESTARTS)"),
        ("interrupted", "75", {"REASON": "runs/a/STOP exists"}, "not requeued; submit it again"),
    ],
)
def test_who_is_requeued(tmp_path, status, code, signs, words):
    more = {"SLURM_NTASKS_PER_NODE": "1", "STATUS": status, "CODE": code}
    done, is_requeued = submit(tmp_path, **more, **signs)
    assert is_requeued == (words == REQUEUED), done.stdout + done.stderr
    assert is_requeued or (done.returncode == int(code) and words in done.stdout)


def test_what_is_missing_is_named(tmp_path):
    done = run_script("sweep", [], SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2 and "launch/sweep.sbatch config=NAME" in done.stderr
    done, _ = submit(tmp_path)
    assert done.returncode != 0 and "submit with --ntasks-per-node=N" in done.stderr


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
def test_a_task_packs_the_part_of_its_number(tmp_path, task, count, parts, shard_range):
    job = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": count, "PARTS": parts}
    fixed = {"PYTHON": "echo", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = run_script("pack", ["source=a", "out=b"], **fixed, **job)
    if shard_range is None:
        assert done.returncode == 2 and "set PARTS to the number of all" in done.stderr
    else:
        assert done.stdout == f"-m vae_dist.pack source=a out=b shard_range={shard_range}\n"
