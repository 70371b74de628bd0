"""`vae_dist.train` online, against the stand-in server: training ends in the same number of steps
whatever the service does, and what can arrive has arrived."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.distributed import LAUNCHER_VARIABLES
from tests.support.tiny_run import write_images
from tests.support.training import arguments, rows, status
from tests.support.wandb_server import WandbServer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 1500
EVERY = 5  # steps between rows
FINISH_S = 8  # wandb.finish_timeout_s
SLACK_S = 30  # of a busy machine, from the last row to the end of the process without W&B

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So few images that a step and an evaluation take milliseconds."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(1, 256, (16, 8, 8), dtype=np.uint8)
    for name in ("train", "validation"):
        write_images(folder / name, pixels)
    return folder


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


def environment(home: Path, **changes: str) -> dict[str, str]:
    """No settings and no login but those of the test."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in LAUNCHER_VARIABLES and not key.startswith("WANDB_")
    }
    clean |= {"HOME": str(home), "NETRC": str(home / "none"), "PYTHONPATH": str(ROOT)}
    return clean | {"OMP_NUM_THREADS": "1"} | changes


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
            env=environment(run.parent, **server.environment()),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def wait_for(self, step: int) -> None:
        wait(lambda: self._stands_at(step), self.process)

    def _stands_at(self, step: int) -> bool:
        log = self.run / "log.jsonl"
        return log.exists() and f'"step": {step},' in log.read_text()

    def finish(self, *, code: int = 0) -> str:
        said = self.process.communicate(timeout=240)[0]
        assert self.process.returncode == code, said
        assert "Traceback" not in said
        return said


def wait(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 180
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.01)


def assert_all_arrived(server: WandbServer, run: Path) -> None:
    """Each row once and in order, each picture with the bytes of its file."""
    assert server.wait(lambda: server.only_run().complete, seconds=60)
    recorded = server.only_run()
    steps = list(range(EVERY, STEPS + 1, EVERY))
    assert recorded.steps("train/loss") == steps
    losses = [row["train/loss"] for row in recorded.history if "train/loss" in row]
    assert losses == [row["train/loss"] for _, row in sorted(rows(run).items())]
    pictures = [
        (key.removeprefix("images/"), row["trainer/step"], value)
        for row in recorded.history
        for key, value in row.items()
        if key.startswith("images/")
    ]
    assert len(pictures) == len(list((run / "images").iterdir())) >= 8
    for name, step, value in pictures:
        path = run / "images" / f"{name}_{step:08d}.png"
        assert recorded.files[value["path"]] == path.read_bytes()
        assert value["caption"].startswith(f"step {step} | ")
    assert recorded.steps("latent/kl_nats_per_unit") == [STEPS // 2, STEPS]


def test_rows_config_and_pictures_arrive(server, tmp_path, images):
    Training(server, tmp_path / "run", images, "wandb.tags=[a, b]", "wandb.group=g").finish()
    assert_all_arrived(server, tmp_path / "run")
    recorded = server.only_run()
    assert (recorded.name, recorded.tags, recorded.group) == ("run", ["a", "b"], "g")
    assert (recorded.project, recorded.exit_code, server.unknown) == ("vae_dist", 0, [])
    config = recorded.user_config
    assert (config["optimizer.lr"], config["training.steps"]) == (1e-3, STEPS)
    assert "vae_dist.train config=debug" in config["environment"]["command"]
    assert config["environment"]["versions"]["torch"]


def break_down(server: WandbServer, fault: str) -> None:
    if fault == "outage":
        server.stop()
    elif fault == "hang":
        server.hang.set()
    else:
        server.fail = {"/files/": int(fault), "/graphql": int(fault), "/storage/": int(fault)}


def recover(server: WandbServer, fault: str) -> None:
    if fault == "outage":
        server.start()
    server.fail = {}
    server.hang.clear()
    server.resume.set()


def assert_trained(run: Path) -> None:
    assert sorted(rows(run)) == list(range(EVERY, STEPS + 1, EVERY))
    assert status(run)["status"] == "finished"


def wait_for_rows(server: WandbServer, training: Training) -> None:
    """Until some rows have arrived; the run must still be at work then."""
    training.wait_for(EVERY)
    assert server.wait(lambda: bool(server.only_run().steps("train/loss")))
    assert training.process.poll() is None
    assert f'"step": {STEPS},' not in (training.run / "log.jsonl").read_text()


@pytest.mark.parametrize("fault", ["outage", "500"])
def test_a_fault_that_passes(server, tmp_path, images, fault):
    training = Training(server, tmp_path / "run", images)
    wait_for_rows(server, training)
    break_down(server, fault)
    time.sleep(2)
    recover(server, fault)
    assert "did not get" not in training.finish()
    assert_trained(tmp_path / "run")
    assert_all_arrived(server, tmp_path / "run")


@pytest.mark.parametrize("fault", ["outage", "500", "403", "hang"])
def test_a_fault_that_stays(server, tmp_path, images, fault):
    """What has arrived stays, the rest is on disk and can be sent later, each point once."""
    run = tmp_path / "run"
    training = Training(server, run, images)
    wait_for_rows(server, training)
    break_down(server, fault)
    said = training.finish()
    assert time.time() - (run / "log.jsonl").stat().st_mtime < FINISH_S + SLACK_S
    assert_trained(run)
    how = f"python -m vae_dist.upload run={run}"
    assert f"W&B did not get everything; upload the rest with: {how}" in said
    recover(server, fault)
    assert 0 < len(server.only_run().steps("train/loss")) < STEPS // EVERY
    answer = subprocess.run(
        [sys.executable, *how.split()[1:]],
        env=environment(tmp_path, **server.environment()),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(f"uploaded: {run} up to step {STEPS}")
    assert_all_arrived(server, run)


@pytest.mark.parametrize("obstacle", ["outage", "hang", "500"])
def test_an_obstacle_at_the_start(server, tmp_path, images, obstacle):
    break_down(server, obstacle)
    said = Training(server, tmp_path / "run", images, "training.steps=20").finish()
    assert max(rows(tmp_path / "run")) == 20
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    because = "answers with HTTP error 500" if obstacle == "500" else "does not answer"
    assert f"W&B is offline: {server.url} {because}; upload this run with" in said
    assert f"wandb sync {folder}" in said


def test_online_by_name_ends_with_the_reason(server, tmp_path, images):
    server.stop()
    said = Training(server, tmp_path / "run", images, "wandb.mode=online").finish(code=2)
    assert f"wandb.mode=online but {server.url} does not answer" in said


def test_the_stop_button_is_a_clean_stop(server, tmp_path, images):
    run = tmp_path / "run"
    training = Training(server, run, images, "training.steps=1000000", "log.every=10")
    training.wait_for(20)
    server.stopped.add(server.only_run().id)
    said = training.finish(code=75)
    stood = status(run)
    assert (stood["status"], "interrupted at step" in said) == ("interrupted", True)
    assert (run / "checkpoints" / f"step_{stood['step']:08d}" / "model.safetensors").exists()
    assert server.only_run().complete
