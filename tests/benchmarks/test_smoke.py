"""Each benchmark runs with small settings and ends with one JSON object."""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"OMP_NUM_THREADS": "1", "PEERS_PYTHON": "", "SMALL": "1", "BUDGET_S": "3600"}


def output(*command, **variables):
    environment = {**os.environ, **SMALL, **variables}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    return ended.stdout


def last_line(name, *words):
    said = output(sys.executable, "-m", f"benchmarks.{name}", *words)
    return json.loads(said.splitlines()[-1])


def test_each_benchmark_can_be_imported():
    for module in pkgutil.iter_modules(benchmarks.__path__):
        importlib.import_module(f"benchmarks.{module.name}")


@pytest.mark.slow
def test_what_a_gpu_is_asked_for_runs_small_on_a_cpu(tmp_path):
    """Each part of benchmarks/gpu.sh, with its own words, so that no minute of a GPU is lost
    (blocks has those of imagenet256, and compiles for minutes)."""
    parts = ["losses", "mnist", "celeba64", "imagenet256", "autoencoder", "f16", "profile"]
    parts += ["celeba256", "ladder"]
    said = output("bash", "benchmarks/gpu.sh", *parts, OUT=str(tmp_path), PYTHON=sys.executable)
    assert re.findall(r"-> exit code (\d+)", said) == ["0"] * len(parts), said[-3000:]
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(found) == len(parts) - 1  # the ladder leaves its run folder
    assert (tmp_path / "ladder" / "log.jsonl").stat().st_size > 0
    shapes = {row["shape"] for each in found for row in each.get("rows", []) if "shape" in row}
    assert shapes == {"celeba64", "imagenet256_kl_f8", "imagenet256_f16_dc", "celeba256_kl_f8"}


@pytest.mark.slow
def test_scaling():
    words = ["rounds=1", "steps=2", "warmup=2", "images=8", "config=debug", "data.slots=8"]
    found = last_line("scaling", *words)
    assert [arm["arm"] for arm in found["arms"]] == ["1 process", "2 processes", "2 alone"]
    assert all(arm["efficiency"] > 0 for arm in found["arms"])


@pytest.mark.slow
def test_peers_that_are_not_there_are_left_out():
    tiny = ["model.channels=[8,8]", "model.norm_groups=4", "model.blocks=1"]
    tiny += ["training.batch_size=8", "data.slots=8"]
    (row,) = last_line("peers", "seconds=1", "threads=1", *tiny)["mnist"]
    assert row["model"] == "ours, config=mnist"
