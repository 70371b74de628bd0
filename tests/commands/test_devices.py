"""The command line on a CUDA device: train, go on, evaluate, sample, encode, decode."""

import json
import subprocess
import sys

import pytest
import torch

from tests.support.devices import CUDA, fresh_accelerate
from tests.support.training import arguments, rows, status
from vae_dist import decode, encode, evaluate, reconstruct, sample

MODEL = ("model.latent=spatial", "model.latent_channels=2", "likelihood.kind=gaussian")
# what a GPU takes by default, said aloud
ON_CUDA = ("training.precision=bf16", "runtime.compile=true", "runtime.channels_last=true")


def train(*words, launcher=()):
    """In a process of its own, as compilers and launchers want it; what it printed."""
    command = [sys.executable, *launcher, "-m", "vae_dist.train", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    printed = ended.stdout + ended.stderr
    assert ended.returncode == 0, printed[-5000:]
    return printed


def done(verb, run, out, *keys):
    with fresh_accelerate():
        assert verb.main([f"run={run}", f"out={out}", *keys]) == 0


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_every_command(device, digits, tmp_path):
    run, is_cpu = tmp_path / "run", device == "cpu"
    options = ("data.workers=2", "training.microbatch_size=auto", "training.spike_factor=100")
    on_device = ("runtime.device=cpu",) if is_cpu else ON_CUDA
    keys = arguments(run, digits, *MODEL, *on_device, *options, "training.steps=20")
    assert "memory of one process" in train(*keys, "dry_run=true")
    printed = train(*keys)
    assert f"1 x {device}" in printed and "warning: " not in printed, printed
    logged = rows(run)
    assert status(run)["status"] == "finished" and sorted(logged) == list(range(1, 21))
    assert logged[20]["train/loss"] < logged[1]["train/loss"]
    assert logged[20]["optim/skipped_steps"] == 0
    assert list((run / "images").rglob("*.png"))
    train(*keys, "training.steps=22", "resume.allow_changes=true", "runtime.compile=false")
    assert max(rows(run)) == 22
    found = []
    for place in ("auto", "cpu"):
        out = tmp_path / f"{place}.json"
        done(evaluate, run, out, "samples=16", f"device={place}")
        found.append(json.loads(out.read_text())["figures"]["neg_elbo_nats"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    done(sample, run, tmp_path / "samples.png", "num_images=9")
    done(reconstruct, run, tmp_path / "reconstructions.png")
    for precision in ("no",) if is_cpu else ("no", "bf16"):
        latents = tmp_path / f"latents_{precision}"
        done(encode, run, latents, f"data={digits}/validation", f"precision={precision}")
        assert json.loads((latents / "encode.json").read_text())["samples"] == 64
    done(decode, run, tmp_path / "decoded.png", f"data={tmp_path}/latents_no", "num_images=9")


@pytest.mark.parametrize("device", [CUDA])
def test_training_under_a_launcher(device, digits, tmp_path):
    """DDP over NCCL on two devices, and where there is one on that."""
    run, world = tmp_path / "run", min(2, torch.cuda.device_count())
    words = arguments(run, digits, "training.steps=10", "training.checksum_every=5")
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}")
    assert f"{world} x {device}" in train(*words, launcher=launcher)
    assert status(run)["status"] == "finished"
    assert rows(run)[10]["train/loss"] < rows(run)[1]["train/loss"]
