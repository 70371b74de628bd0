"""`vae_dist.train` online, against the stand-in server: training ends in the same number of steps
whatever the service does, and what can arrive has arrived."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.distributed import LAUNCHER_VARIABLES
from tests.support.training import arguments, rows, status
from tests.support.wandb_server import WandbServer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 120

pytestmark = pytest.mark.slow


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

    def __init__(self, server: WandbServer, run: Path, digits: Path, *overrides: str) -> None:
        self.run = run
        options = [
            option
            for option in arguments(run, digits, "wandb.finish_timeout_s=8", "log.num_images=4")
            if not option.startswith("wandb.mode")
        ]
        given = [f"training.steps={STEPS}", f"evaluation.every={STEPS // 2}", *overrides]
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
        said = self.process.communicate(timeout=100)[0]
        assert self.process.returncode == code, said
        assert "Traceback" not in said
        return said


def wait(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.01)


def assert_all_arrived(server: WandbServer, run: Path) -> None:
    """Each row once and in order, each picture with the bytes of its file."""
    assert server.wait(lambda: server.only_run().complete)
    recorded = server.only_run()
    steps = list(range(1, STEPS + 1))
    assert recorded.steps("train/loss") == steps
    losses = [row["train/loss"] for row in recorded.history if "train/loss" in row]
    assert losses == [row["train/loss"] for _, row in sorted(rows(run).items())]
    pictures = [
        (key.removeprefix("images/"), row["trainer/step"], value)
        for row in recorded.history
        for key, value in row.items()
        if key.startswith("images/")
    ]
    assert len(pictures) == len(list((run / "images").iterdir())) >= 10
    for name, step, value in pictures:
        path = run / "images" / f"{name}_{step:08d}.png"
        assert recorded.files[value["path"]] == path.read_bytes()
        assert value["caption"].startswith(f"step {step} | ")
    assert recorded.steps("latent/kl_nats_per_unit") == [STEPS // 2, STEPS]


def test_rows_config_and_pictures_arrive(server, tmp_path, digits):
    Training(server, tmp_path / "run", digits, "wandb.tags=[a, b]", "wandb.group=g").finish()
    assert_all_arrived(server, tmp_path / "run")
    recorded = server.only_run()
    assert (recorded.name, recorded.tags, recorded.group) == ("run", ["a", "b"], "g")
    assert (recorded.project, recorded.exit_code, server.unknown) == ("vae_dist", 0, [])
    config = recorded.user_config
    assert (config["optimizer.lr"], config["training.steps"]) == (1e-3, STEPS)
    assert "vae_dist.train config=debug" in config["environment"]["command"]
    assert config["environment"]["versions"]["torch"]


@pytest.mark.parametrize("fault", ["outage", "500", "403", "hang"])
def test_a_fault_in_mid_run(server, tmp_path, digits, fault):
    training = Training(server, tmp_path / "run", digits)
    training.wait_for(20)
    if fault == "outage":
        server.stop()
    elif fault == "hang":
        server.hang.set()
    else:
        server.fail = {"/files/": int(fault), "/graphql": int(fault), "/storage/": int(fault)}
    training.wait_for(80)
    if fault == "outage":
        server.start()
    elif fault == "500":
        server.fail = {}
    said = training.finish()
    assert sorted(rows(tmp_path / "run")) == list(range(1, STEPS + 1))
    assert status(tmp_path / "run")["status"] == "finished"
    if fault in ("outage", "500"):
        assert_all_arrived(server, tmp_path / "run")
        return
    if fault == "hang":
        assert "did not finish cleanly" in said
        server.hang.clear()
        server.resume.set()
    server.fail = {}
    (folder,) = (tmp_path / "run" / "wandb").glob("run-*")
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--include-online", str(folder)],
        env=environment(tmp_path, **server.environment()),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert_all_arrived(server, tmp_path / "run")


@pytest.mark.parametrize("obstacle", ["no network", "500", "hang"])
def test_an_obstacle_at_the_start(server, tmp_path, digits, obstacle):
    if obstacle == "no network":
        server.stop()
    elif obstacle == "hang":
        server.hang.set()
    else:
        server.fail = {"/graphql": 500}
    began = time.monotonic()
    said = Training(server, tmp_path / "run", digits, "training.steps=20").finish()
    assert time.monotonic() - began < 90
    assert sorted(rows(tmp_path / "run")) == list(range(1, 21))
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert f"wandb sync {folder}" in said


def test_online_by_name_ends_with_the_reason(server, tmp_path, digits):
    server.stop()
    said = Training(server, tmp_path / "run", digits, "wandb.mode=online").finish(code=2)
    assert f"wandb.mode=online but {server.url} does not answer" in said


def test_the_stop_button_is_a_clean_stop(server, tmp_path, digits):
    run = tmp_path / "run"
    training = Training(server, run, digits, "training.steps=1000000", "log.every=10")
    training.wait_for(20)
    server.stopped.add(server.only_run().id)
    said = training.finish(code=75)
    stood = status(run)
    assert (stood["status"], "interrupted at step" in said) == ("interrupted", True)
    assert (run / "checkpoints" / f"step_{stood['step']:08d}" / "model.safetensors").exists()
    assert server.only_run().complete
