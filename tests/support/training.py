"""Short training runs of the real `train` command, and what they leave."""

import json
import os
import signal

import safetensors.torch
import torch

from tests.support.distributed import run_ranks
from vae_dist.train import main
from vae_dist.training.loop import Trainer


def arguments(run, digits, *overrides):
    """config=debug in small batches, no loader processes, no W&B, one thread."""
    fixed = (
        *("data.bundled=none", "data.workers=0", "data.slots=8", "training.batch_size=16"),
        *("optimizer.warmup_steps=2", "log.num_images=2"),
        *("wandb.mode=disabled", "runtime.threads=1"),
    )
    data = (f"data.train={digits}/train", f"data.validation={digits}/validation")
    return ["config=debug", f"run={run}", *data, *fixed, *overrides]


def train(run, digits, *overrides, world=1):
    """In forked processes; the exit code of each rank."""
    return run_ranks(world, main, arguments(run, digits, *overrides), timeout_s=100)


def stop_after(monkeypatch, step):
    """SIGTERM to the last rank alone when a step is done; forked ranks inherit this."""
    advance = Trainer._advance

    def advance_and_stop(self):
        advance(self)
        if self.step == step and self.runtime.rank == self.runtime.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_advance", advance_and_stop)


def rows(run):
    """The rows of log.jsonl by step. Fails when a step has two."""
    parsed = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    by_step = {row["step"]: row for row in parsed}
    assert len(by_step) == len(parsed)
    return by_step


def losses(run):
    """train/loss of steps 1, 2, ... without a gap."""
    found = rows(run)
    assert sorted(found) == list(range(1, len(found) + 1))
    return torch.tensor([found[step]["train/loss"] for step in sorted(found)])


def status(run):
    return json.loads((run / "status.json").read_text())


def weights(run, step, name="model"):
    folder = run / "checkpoints" / f"step_{step:08d}"
    return safetensors.torch.load_file(folder / f"{name}.safetensors")


def same_weights(one, other, step):
    """Whether all tensors of two runs' checkpoints are equal bit for bit."""
    for path in sorted((other / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")):
        ours, theirs = weights(one, step, path.stem), weights(other, step, path.stem)
        assert ours and ours.keys() == theirs.keys()
        if not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return False
    return True
