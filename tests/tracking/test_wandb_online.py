"""A run that is killed after 1,200 steps and goes on from its checkpoint at 1,000."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.wandb_server import WandbServer

ROOT = Path(__file__).resolve().parents[2]

LIFE = """
import os, signal, sys, time
from pathlib import Path
import torch
from vae_dist.config.schema import TrainConfig
from vae_dist.tracking.images import grid, save_png
from vae_dist.tracking.sinks import JsonlSink, WandbSink

folder, mode, first, last, is_killed = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
config = TrainConfig()
config.wandb.mode = mode
log = JsonlSink(folder / "log.jsonl", resume_step=first)
wandb = WandbSink(config, folder, resume_step=first)
if first:
    wandb.backfill(folder / "log.jsonl", folder / "images", up_to=first)
for step in range(first + 1, last + 1):
    for sink in (log, wandb):
        sink.log(step, {"train/loss": 1 / step})
    if step % 100 == 0:
        picture = grid(torch.full((1, 1, 8, 8), step / 2000))
        path = save_png(picture, folder / "images" / f"samples_{step:08d}.png")
        wandb.image(step, "images/samples", path, f"step {step}")
        time.sleep(0.2)
if is_killed:
    os.kill(os.getpid(), signal.SIGKILL)
wandb.close("finished")
print(wandb.mode)
"""


def live(server: WandbServer, folder: Path, mode: str, first: int, last: int, *, kill: bool) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    own = {"HOME": str(folder), "NETRC": str(folder / "none"), "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", LIFE, str(folder), mode, str(first), str(last), str(int(kill))],
        env=clean | own | server.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
    )
    assert process.returncode == (-signal.SIGKILL if kill else 0)
    return process.stdout


def wait_until_quiet(server: WandbServer) -> None:
    """Until what the killed run's uploader still holds has come."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < 3:
        if (now := len(server.only_run().history)) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.1)


@pytest.mark.slow
def test_each_point_once_after_a_kill(tmp_path: Path) -> None:
    with WandbServer() as server:
        live(server, tmp_path, "auto", 0, 1200, kill=True)
        wait_until_quiet(server)
        live(server, tmp_path, "auto", 1000, 1300, kill=False)
        run = server.only_run()
        assert server.wait(lambda: run.complete)
        assert sorted(run.steps("train/loss")) == list(range(1, 1301))
        assert sorted(run.steps("images/samples")) == list(range(100, 1301, 100))
        files = {row["images/samples"]["path"] for row in run.history if "images/samples" in row}
        assert files <= set(run.files) and len(files) == 13
        assert server.unknown == []
