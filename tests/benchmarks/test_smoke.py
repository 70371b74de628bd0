"""Each benchmark runs with small settings and ends with one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SMALL = ["runtime.threads=1", "runtime.device=cpu"]
LATENTS = [
    "config=photos64",
    "runtime.device=cpu",
    "data.workers=0",
    "model.latent=spatial",
    "model.latent_channels=4",
    "model.channels=[8,8]",
    "model.patch=1",
    "model.blocks=1",
    "model.norm_groups=4",
    "training.batch_size=4",
]


def last_line(name: str, *words: str, **variables: str) -> Any:
    ended = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_step() -> None:
    shapes = "shapes=mnist,celeba64"
    found = last_line("step", shapes, "rounds=2", "steps=1", "warmup=1", *SMALL)
    assert [row["shape"] for row in found["rows"]] == ["mnist", "celeba64"]
    assert all(row["ratio"] > 0 for row in found["rows"])


def test_profile(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    words = ["config=debug", f"trace={trace}", "steps=2", "warmup=2", *SMALL]
    words += [f"data.{part}={tmp_path}/data/{part}" for part in ("train", "validation")]
    found = last_line("profile", *words)
    assert any("conv" in row["operator"] for row in found["top"])
    assert json.loads(trace.read_text())["traceEvents"]


def test_heap() -> None:
    found = last_line("heap", "seconds=1", "turn_s=0.5", "config=debug", *SMALL)
    assert [row["arm"] for row in found["rows"]] == ["kept", "returned"]
    assert found["ratio"] > 0


def test_scaling() -> None:
    words = ["rounds=1", "steps=2", "warmup=2", "images=8", "config=debug", "data.slots=8"]
    found = last_line("scaling", *words)
    assert [arm["arm"] for arm in found["arms"]] == ["1 process", "2 processes", "2 alone"]
    assert all(arm["efficiency"] > 0 for arm in found["arms"])


def test_mnist_minute() -> None:
    found = last_line("mnist_minute", "steps=110", *SMALL)
    assert found["num_images"] == 1000
    assert 100 < found["neg_elbo_nats"] < 400
    assert not found["reached"]


def test_autoencoder_without_its_peer() -> None:
    words = ["seconds=1", "turn_s=0.5", "pool=16", "num_images=4", "arms=ours,diffusers"]
    found = last_line("autoencoder", *words, *LATENTS, PEERS_PYTHON="")
    (arm,) = found["arms"]
    assert arm["arm"] == "ours"
    assert arm["steps"] > 0
    assert 0 < arm["psnr_db"] < 60
    assert "PEERS_PYTHON is not set" in found["missing"]["diffusers"]


def test_peers_that_are_not_there_are_left_out() -> None:
    found = last_line("peers", "seconds=8", "parts=mnist", "threads=1", PEERS_PYTHON="")
    (row,) = found["mnist"]
    assert row["model"] == "ours, config=mnist"


@pytest.mark.parametrize("name", ["step", "scaling", "soak"])
def test_help_is_what_the_file_says(name: str) -> None:
    asked = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    ended = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"python -m benchmarks.{name}" in ended.stdout
