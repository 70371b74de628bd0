"""The command line on a CUDA device: train, go on, evaluate, sample, encode, decode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.devices import CUDA, fresh_accelerate
from tests.support.distributed import LAUNCHER_VARIABLES
from tests.support.training import arguments, rows, status
from vae_dist import decode, encode, evaluate, reconstruct, sample

MODEL = ("model.latent=spatial", "model.latent_channels=2", "likelihood.kind=gaussian")
# what a GPU takes by default, said aloud
ON_CUDA = ("training.precision=bf16", "runtime.compile=true", "runtime.channels_last=true")


def train(*words: str, launcher: tuple[str, ...] = ()) -> str:
    """In a process of its own, as compilers and launchers want it; what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", "vae_dist.train", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    printed = ended.stdout + ended.stderr
    assert ended.returncode == 0, printed[-5000:]
    return printed


def done(verb: Any, run: Path, out: Path, *keys: str) -> None:
    with fresh_accelerate():
        assert verb.main([f"run={run}", f"out={out}", *keys]) == 0


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_every_command(device: str, digits: Path, tmp_path: Path) -> None:
    run, is_cpu = tmp_path / "run", device == "cpu"
    keys = arguments(
        run,
        digits,
        *MODEL,
        *(("runtime.device=cpu",) if is_cpu else ON_CUDA),
        "data.workers=2",
        "training.microbatch_size=auto",
        "training.spike_factor=100",
        "training.steps=20",
    )
    assert "memory of one process" in train(*keys, "dry_run=true")
    printed = train(*keys)
    assert f"1 x {device}" in printed and "warning: " not in printed, printed
    assert status(run)["status"] == "finished"
    assert sorted(rows(run)) == list(range(1, 21))
    assert rows(run)[20]["train/loss"] < rows(run)[1]["train/loss"]
    assert rows(run)[20]["optim/skipped_steps"] == 0
    assert list((run / "images").rglob("*.png"))
    train(*keys, "training.steps=22", "resume.allow_changes=true", "runtime.compile=false")
    assert max(rows(run)) == 22
    found = []
    for place in ("auto", "cpu"):
        out = tmp_path / f"{place}.json"
        done(evaluate, run, out, "samples=16", "max_images=64", f"device={place}")
        found.append(json.loads(out.read_text())["figures"]["neg_elbo_nats"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    done(sample, run, tmp_path / "samples.png", "num_images=9")
    done(reconstruct, run, tmp_path / "reconstructions.png")
    data = f"data={digits}/validation"
    for precision in ("no",) if is_cpu else ("no", "bf16"):
        latents = tmp_path / f"latents_{precision}"
        done(encode, run, latents, data, f"precision={precision}")
        assert json.loads((latents / "encode.json").read_text())["samples"] == 1000
    done(decode, run, tmp_path / "decoded.png", f"data={tmp_path}/latents_no", "num_images=9")


@pytest.mark.parametrize("device", [CUDA])
def test_training_under_a_launcher(device: str, digits: Path, tmp_path: Path) -> None:
    """DDP over NCCL on two devices, and where there is one on that."""
    world = min(2, torch.cuda.device_count())
    words = arguments(tmp_path / "run", digits, "training.steps=10", "training.checksum_every=5")
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}")
    assert f"{world} x {device}" in train(*words, launcher=launcher)
    assert status(tmp_path / "run")["status"] == "finished"
    assert rows(tmp_path / "run")[10]["train/loss"] < rows(tmp_path / "run")[1]["train/loss"]
