"""Each benchmark runs with small settings and ends with one JSON object."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SMALL = ["runtime.threads=1", "runtime.device=cpu"]


def last_line(name, *words):
    ended = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PEERS_PYTHON": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_what_a_gpu_is_asked_for_runs_small_on_a_cpu(tmp_path):
    """Each part of benchmarks/gpu.sh, with its own words, so that no minute of a GPU is lost
    (blocks has those of imagenet256, and compiles for minutes)."""
    parts = "losses mnist celeba64 imagenet256 autoencoder f16 profile celeba256 ladder"
    ended = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", *parts.split()],
        env={**os.environ, "SMALL": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
        | {"OMP_NUM_THREADS": "1", "BUDGET_S": "3600", "PEERS_PYTHON": ""},
        capture_output=True,
        text=True,
    )
    codes = re.findall(r"-> exit code (\d+)", ended.stdout)
    assert codes == ["0"] * len(parts.split()), ended.stdout[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    shapes = [
        row["rows"][0]["shape"] for row in rows if "rows" in row and "shape" in row["rows"][0]
    ]
    assert shapes == [
        "celeba64", "imagenet256_kl_f8", "imagenet256_f16_dc", "celeba256_kl_f8",
    ]  # fmt: skip
    assert len(rows) == len(parts.split()) - 1  # the ladder leaves its run folder
    assert (tmp_path / "ladder" / "log.jsonl").stat().st_size > 0


def test_scaling():
    words = ["rounds=1", "steps=2", "warmup=2", "images=8", "config=debug", "data.slots=8"]
    found = last_line("scaling", *words)
    assert [arm["arm"] for arm in found["arms"]] == ["1 process", "2 processes", "2 alone"]
    assert all(arm["efficiency"] > 0 for arm in found["arms"])


def test_peers_that_are_not_there_are_left_out():
    """Ours is a tiny model: the speed of the machine is measured first."""
    tiny = ["model.channels=[8,8]", "model.norm_groups=4", "model.blocks=1"]
    tiny += ["training.batch_size=8", "data.slots=8"]
    found = last_line("peers", "seconds=1", "threads=1", *tiny)
    (row,) = found["mnist"]
    assert row["model"] == "ours, config=mnist"


def test_help_is_what_the_file_says():
    asked = [sys.executable, "-m", "benchmarks.step", "--help"]
    ended = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m benchmarks.step" in ended.stdout
