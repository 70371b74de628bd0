"""The command line on a CUDA device: train, go on, evaluate, sample, encode, decode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


def done(main: Callable[[list[str]], int], *words: str) -> None:
    with fresh_accelerate():
        assert main(list(words)) == 0


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_every_command(device: str, digits: Path, tmp_path: Path) -> None:
    run, is_cpu = tmp_path / "run", device == "cpu"
    words = arguments(
        run,
        digits,
        *MODEL,
        *(("runtime.device=cpu",) if is_cpu else ON_CUDA),
        "data.workers=2",
        "training.microbatch_size=auto",
        "training.spike_factor=100",
        "training.steps=20",
    )
    assert "memory of one process" in train(*words, "dry_run=true")
    printed = train(*words)
    assert f"1 x {device}" in printed and "warning: " not in printed, printed
    assert status(run)["status"] == "finished"
    assert sorted(rows(run)) == list(range(1, 21))
    assert rows(run)[20]["train/loss"] < rows(run)[1]["train/loss"]
    assert rows(run)[20]["optim/skipped_steps"] == 0
    assert list((run / "images").rglob("*.png"))
    train(*words, "training.steps=22", "resume.allow_changes=true", "runtime.compile=false")
    assert max(rows(run)) == 22
    results = []
    for place in ("auto", "cpu"):
        out = tmp_path / f"{place}.json"
        keys = (f"out={out}", "samples=16", "max_images=64", f"device={place}")
        done(evaluate.main, f"run={run}", *keys)
        results.append(neg_elbo_nats(json.loads(out.read_text())))
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    done(sample.main, f"run={run}", "num_images=9", f"out={tmp_path}/samples.png")
    done(reconstruct.main, f"run={run}", f"out={tmp_path}/reconstructions.png")
    for precision in ("no",) if is_cpu else ("no", "bf16"):
        latents = tmp_path / f"latents_{precision}"
        keys = (f"data={digits}/validation", f"precision={precision}", f"out={latents}")
        done(encode.main, f"run={run}", *keys)
        assert json.loads((latents / "encode.json").read_text())["samples"] == 1000
    decoded = (f"data={tmp_path}/latents_no", f"out={tmp_path}/decoded.png", "num_images=9")
    done(decode.main, f"run={run}", *decoded)


def neg_elbo_nats(results: object) -> float | None:
    """Wherever it stands among them."""
    if not isinstance(results, dict):
        return None
    parts = [results.get("neg_elbo_nats"), *map(neg_elbo_nats, results.values())]
    return next((part for part in parts if part is not None), None)


@pytest.mark.parametrize("device", [CUDA])
def test_training_under_a_launcher(device: str, digits: Path, tmp_path: Path) -> None:
    """DDP over NCCL on two devices, and where there is one on that."""
    world = min(2, torch.cuda.device_count())
    words = arguments(tmp_path / "run", digits, "training.steps=10", "training.checksum_every=5")
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}")
    assert f"{world} x {device}" in train(*words, launcher=launcher)
    assert status(tmp_path / "run")["status"] == "finished"
    assert rows(tmp_path / "run")[10]["train/loss"] < rows(tmp_path / "run")[1]["train/loss"]
