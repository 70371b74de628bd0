"""A run that is killed after 1,200 steps and goes on from its checkpoint at 1,000, online or not:
W&B has each point once, as log.jsonl and the picture files have it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.tiny_run import tiny_config
from tests.support.wandb_server import WandbServer
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.sinks import read_rows

ROOT = Path(__file__).resolve().parents[2]

LIFE = """
import os, signal, sys, time
from pathlib import Path
import torch
from vae_dist.config.schema import TrainConfig
from vae_dist.tracking.images import grid, save_png
from vae_dist.tracking.sinks import JsonlSink
from vae_dist.tracking.wandb_sink import WandbSink

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


def ask(server: WandbServer, folder: Path, *command: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    answer = subprocess.run(
        [sys.executable, "-m", *command],
        env=clean | {"HOME": str(folder), "PYTHONPATH": str(ROOT)} | server.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def assert_each_point_once(server: WandbServer, folder: Path) -> None:
    run = server.only_run()
    assert server.wait(lambda: run.complete)
    rows = dict(read_rows(folder / "log.jsonl"))
    sent = [row for row in run.history if "train/loss" in row]
    assert sorted(row["trainer/step"] for row in sent) == list(range(1, 1301)) == sorted(rows)
    for row in sent:
        assert row["train/loss"] == rows[row["trainer/step"]]["train/loss"]
    assert sorted(run.steps("images/samples")) == list(range(100, 1301, 100))
    for row in run.history:
        if "images/samples" in row:
            path = folder / "images" / f"samples_{row['trainer/step']:08d}.png"
            assert run.files[row["images/samples"]["path"]] == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("before", ["auto", "offline"])
@pytest.mark.parametrize("after", ["auto", "offline"])
def test_each_point_once_after_a_kill(tmp_path: Path, before: str, after: str) -> None:
    RunFolder(tmp_path).write_config(tiny_config())
    with WandbServer() as server:
        live(server, tmp_path, before, 0, 1200, kill=True)
        if before == "auto":
            wait_until_quiet(server)
            assert 0 < len(server.only_run().history) < 1213
        said = live(server, tmp_path, after, 1000, 1300, kill=False)
        parts = sorted((tmp_path / "wandb").glob("*run-2*"), key=lambda path: path.name[-24:])
        if (before, after) == ("offline", "offline"):
            assert f"wandb sync {parts[0]} && wandb sync {parts[1]}\n" in said
            for part in parts:
                ask(server, tmp_path, "wandb", "sync", str(part))
        elif after == "offline":
            assert f"python -m vae_dist.upload run={tmp_path}\n" in said
            ask(server, tmp_path, "vae_dist.upload", f"run={tmp_path}")
        assert_each_point_once(server, tmp_path)
        if after == "auto" or before == "auto":  # what is there already is not sent again
            ask(server, tmp_path, "wandb", "sync", *map(str, parts))
            ask(server, tmp_path, "vae_dist.upload", f"run={tmp_path}")
            assert_each_point_once(server, tmp_path)
            steps = server.only_run().steps("train/loss")
            assert steps == sorted(steps)
        assert server.unknown == []
