"""The W&B sink with the real wandb against the stand-in server: whatever the service does, training
ends in the same number of steps, and each point arrives, also after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny_run import write_images
from tests.support.training import arguments, status
from tests.support.wandb_server import WandbServer
from vae_dist.tracking.images import find_images
from vae_dist.tracking.sinks import read_rows

STEPS = 600
EVERY = 5  # steps between rows
FINISH_S = 8  # wandb.finish_timeout_s
SLACK_S = 30  # of a busy machine, from the last row to the end of the process without W&B

pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


def sync(server: WandbServer, said: str, home: Path) -> None:
    """Types the last `wandb sync` command that the trainer showed."""
    command = said.rpartition("with: wandb ")[2].splitlines()[0]
    answer = subprocess.run(
        [sys.executable, "-m", "wandb", *command.split()],
        env=server.environment(home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert answer.returncode == 0, answer.stderr


def assert_all_arrived(server: WandbServer, run: Path, *, once: bool = False) -> None:
    """Each row and each image, with the values and the bytes of the run folder."""
    recorded = server.only_run()
    rows = dict(read_rows(run / "log.jsonl"))
    found = find_images(run / "images")
    num_images = sum(map(len, found.values()))
    server.wait(lambda: rows.keys() <= set(recorded.steps("train/loss")))
    server.wait(lambda: sum(name.endswith(".png") for name in recorded.files) >= num_images)
    steps = recorded.steps("train/loss")
    assert sorted(steps if once else set(steps)) == sorted(rows)
    assert found
    for name, paths in found.items():
        steps = recorded.steps(f"images/{name}")
        assert sorted(steps if once else set(steps)) == list(paths)
    lacking = {(name, step) for name, paths in found.items() for step in paths}
    for row in recorded.history:
        step = row["trainer/step"]
        if "train/loss" in row:
            assert row["train/loss"] == rows[step]["train/loss"]
        for key in row.keys() & {f"images/{name}" for name in found}:
            name = key.removeprefix("images/")
            assert row[key]["caption"].startswith(f"step {step}")
            if recorded.files.get(row[key]["path"]) == found[name][step].read_bytes():
                lacking.discard((name, step))
    assert lacking == set()


# training against a service with faults


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So few images that a step and an evaluation take milliseconds."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(1, 256, (16, 8, 8), dtype=np.uint8)
    for name in ("train", "validation"):
        write_images(folder / name, pixels)
    return folder


class Training:
    """A training process; `finish` waits for it and returns what it said."""

    def __init__(self, server: WandbServer, run: Path, images: Path, *overrides: str) -> None:
        self.run = run
        options = [o for o in arguments(run, images) if not o.startswith("wandb.mode")]
        given = [
            f"training.steps={STEPS}",
            f"evaluation.every={STEPS // 2}",
            f"log.every={EVERY}",
            "training.batch_size=4",
            "data.slots=4",
            "log.num_images=4",
            f"wandb.finish_timeout_s={FINISH_S}",
            *overrides,
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vae_dist.train", *options, *given],
            env=server.environment(run.parent),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 180
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                pytest.fail(self.process.communicate()[0])
            time.sleep(0.01)

    def finish(self, *, code: int = 0) -> str:
        said = self.process.communicate(timeout=400)[0]
        assert self.process.returncode == code, said
        assert "Traceback" not in said
        return said


def break_down(server: WandbServer, fault: str) -> None:
    if fault == "outage":
        server.stop()
    elif fault == "hang":
        server.hang.set()
    else:
        server.fail = {"/": int(fault)}


def recover(server: WandbServer, fault: str) -> None:
    if fault == "outage":
        server.start()
    server.fail = {}
    server.hang.clear()
    server.resume.set()


def wait_for_rows(server: WandbServer, training: Training) -> None:
    """Until some rows have arrived; the run must still be at work then."""
    training.wait_for(lambda: any(run.steps("train/loss") for run in list(server.runs.values())))
    assert STEPS not in dict(read_rows(training.run / "log.jsonl"))


def assert_trained(run: Path) -> None:
    assert sorted(dict(read_rows(run / "log.jsonl"))) == list(range(EVERY, STEPS + 1, EVERY))
    assert status(run)["status"] == "finished"


def test_an_outage_that_passes(server, tmp_path, images):
    run = tmp_path / "run"
    training = Training(server, run, images, "wandb.tags=[a, b]", "wandb.group=g")
    wait_for_rows(server, training)
    break_down(server, "outage")
    time.sleep(2)
    recover(server, "outage")
    assert "did not get" not in training.finish()
    assert_trained(run)
    assert_all_arrived(server, run, once=True)
    recorded = server.only_run()
    assert (recorded.name, recorded.tags, recorded.group) == ("run", ["a", "b"], "g")
    assert (recorded.project, recorded.exit_code, server.unknown) == ("vae_dist", 0, [])
    config = recorded.user_config
    assert (config["optimizer.lr"], config["training.steps"]) == (1e-3, STEPS)
    assert "vae_dist.train config=debug" in config["environment"]["command"]
    assert recorded.steps("latent/kl_nats_per_unit") == [STEPS // 2, STEPS]


@pytest.mark.parametrize("fault", ["outage", "500", "hang"])
def test_a_fault_that_stays(server, tmp_path, images, fault):
    """What has arrived stays, the rest is on disk and can be sent later."""
    run = tmp_path / "run"
    training = Training(server, run, images)
    wait_for_rows(server, training)
    break_down(server, fault)
    said = training.finish()
    assert time.time() - (run / "log.jsonl").stat().st_mtime < FINISH_S + SLACK_S
    assert_trained(run)
    assert "W&B did not get everything; upload the rest with: wandb sync" in said
    recover(server, fault)
    assert 0 < len(server.only_run().steps("train/loss")) < STEPS // EVERY
    sync(server, said, tmp_path)
    assert_all_arrived(server, run)


def test_the_stop_button_is_a_clean_stop(server, tmp_path, images):
    run = tmp_path / "run"
    training = Training(server, run, images, "training.steps=1000000", "log.every=10")
    wait_for_rows(server, training)
    server.stopped.add(server.only_run().id)
    said = training.finish(code=75)
    assert (status(run)["status"], "interrupted at step" in said) == ("interrupted", True)
    assert server.only_run().complete


# a run that is killed after 1,200 steps and goes on from its checkpoint at 1,000

LIFE = """
import os, signal, sys, time
from pathlib import Path
import torch
from vae_dist.config.schema import TrainConfig
from vae_dist.tracking.images import grid, save_png
from vae_dist.tracking.sinks import JsonlSink
from vae_dist.tracking.wandb import WandbSink

folder, mode, first, last, is_killed = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
config = TrainConfig()
config.wandb.mode = mode
log = JsonlSink(folder / "log.jsonl", resume_step=first)
wandb = WandbSink(config, folder, resume_step=first)
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
"""


def live(server: WandbServer, folder: Path, mode: str, first: int, last: int, *, kill: bool) -> str:
    process = subprocess.run(
        [sys.executable, "-c", LIFE, str(folder), mode, str(first), str(last), str(int(kill))],
        env=server.environment(folder),
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


@pytest.mark.parametrize("before", ["auto", "offline"])
@pytest.mark.parametrize("after", ["auto", "offline"])
def test_each_point_after_a_kill(server, tmp_path: Path, before: str, after: str) -> None:
    live(server, tmp_path, before, 0, 1200, kill=True)
    if before == "auto":
        wait_until_quiet(server)
        assert 0 < len(server.only_run().history) < 1213
    said = live(server, tmp_path, after, 1000, 1300, kill=False)
    if after == "offline":
        sync(server, said, tmp_path)
    assert_all_arrived(server, tmp_path, once=before == "offline")
    assert server.unknown == []
    points = len(server.only_run().steps("train/loss"))
    assert points <= 1301 if after == "auto" else points <= 2500
