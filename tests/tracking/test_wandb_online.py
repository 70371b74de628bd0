"""The W&B sink with the real wandb against the stand-in server: whatever the service does, training
ends in the same number of steps, and each point arrives, also after a kill."""

import subprocess
import sys
import time

import pytest

from tests.support.tiny_run import random_pixels, write_images
from tests.support.training import arguments, status
from tests.support.wandb_server import WandbServer
from vae_dist.tracking.images import find_images
from vae_dist.tracking.sinks import read_rows

pytestmark = pytest.mark.slow
FINISH_S = 4  # wandb.finish_timeout_s


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


def assert_all_arrived(server, run, *, once=False):
    """Each row and each image, with the values and the bytes of the run folder."""
    recorded, rows = server.only_run(), dict(read_rows(run / "log.jsonl"))
    images = {
        (f"images/{name}", step): path.read_bytes()
        for name, paths in find_images(run / "images").items()
        for step, path in paths.items()
    }

    def has_all():
        history = recorded.history
        losses = {r["trainer/step"]: r["train/loss"] for r in history if "train/loss" in r}
        found = {(k, r["trainer/step"]): r[k] for r in history for k in r if k[:7] == "images/"}
        files = {place: recorded.files.get(image["path"]) for place, image in found.items()}
        assert all(found[name, s]["caption"].split(" |")[0] == f"step {s}" for name, s in found)
        return losses == {step: row["train/loss"] for step, row in rows.items()} and files == images

    assert rows and images and server.wait(has_all) and not server.unknown, server.unknown
    if once:
        assert sorted(recorded.steps("train/loss")) == sorted(rows)


def begin(server, home, *words):
    """Python with the settings that lead to the server."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, *words]
    return subprocess.Popen(command, env=server.environment(home), text=True, **pipes)


def wait_for(process, condition):
    end = time.monotonic() + 180
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.02)


def finish(process, *, code=0):
    """What it said."""
    said = process.communicate(timeout=400)[0]  # closes its stdin: a life goes on
    assert process.returncode == code, said
    return said


def sync(server, said, home):
    """Types the last `wandb sync` command that the trainer showed."""
    command = said.rpartition("with: wandb ")[2].splitlines()[0]
    finish(begin(server, home, "-m", "wandb", *command.split()))


def test_an_outage_that_passes_and_the_stop_button(server, tmp_path):
    for name in ("train", "validation"):
        write_images(tmp_path / name, random_pixels(16, 8, 8))
    run = tmp_path / "run"
    options = [o for o in arguments(run, tmp_path) if not o.startswith("wandb.mode")]
    options += ["training.steps=1000000", "evaluation.every=50", "log.every=10"]
    options += ["wandb.tags=[a, b]", "wandb.group=g"]
    training = begin(server, tmp_path, "-m", "vae_dist.train", *options)

    def sent():
        return [step for run in list(server.runs.values()) for step in run.steps("train/loss")]

    wait_for(training, sent)
    server.stop()
    reached = max(dict(read_rows(run / "log.jsonl")))
    wait_for(training, lambda: max(dict(read_rows(run / "log.jsonl"))) > reached + 100)
    server.start()
    wait_for(training, lambda: max(sent()) > reached + 100)
    recorded = server.only_run()
    server.stopped.add(recorded.id)
    said = finish(training, code=75)
    assert status(run)["status"] == "interrupted" and "interrupted at step" in said
    assert "did not get" not in said and "Traceback" not in said
    assert (recorded.complete, recorded.exit_code) == (True, 1)
    assert_all_arrived(server, run, once=True)
    given = {"project": "vae_dist", "displayName": "run", "groupName": "g", "tags": ["a", "b"]}
    assert recorded.given.items() >= given.items()
    assert recorded.config.items() >= {"optimizer.lr": 1e-3, "training.steps": 1000000}.items()
    assert "vae_dist.train config=debug" in recorded.config["environment"]["command"]
    assert recorded.steps("latent/kl_nats_per_unit")[:2] == [50, 100]


# sinks alone, as training uses them; a life waits at step 200 until its stdin is closed

LIFE = f"""
import sys
from pathlib import Path
import torch
from vae_dist.config.schema import TrainConfig
from vae_dist.tracking.images import grid, save_png
from vae_dist.tracking.sinks import JsonlSink
from vae_dist.tracking.wandb import WandbSink

folder, mode, first, last = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
config = TrainConfig()
config.wandb.mode, config.wandb.finish_timeout_s = mode, {FINISH_S}
log = JsonlSink(folder / "log.jsonl", resume_step=first)
wandb = WandbSink(config, folder, resume_step=first)
for step in range(first + 1, last + 1):
    for sink in (log, wandb):
        sink.log(step, {{"train/loss": 1 / step}})
    if step % 50 == 0:
        picture = grid(torch.full((1, 1, 8, 8), step / 2000))
        path = save_png(picture, folder / "images" / f"samples_{{step:08d}}.png")
        wandb.image(step, "images/samples", path, f"step {{step}}")
    if step == 200:
        (folder / "waits").touch()
        sys.stdin.readline()
wandb.close("finished")
"""


def live(server, folder, mode, first, last):
    return begin(server, folder, "-c", LIFE, str(folder), mode, str(first), str(last))


def has_rows(server):
    return any(run.history for run in list(server.runs.values()))


@pytest.mark.parametrize("fault", ["outage", "500", "hang"])
def test_a_fault_that_stays(server, tmp_path, fault):
    """What has arrived stays, the rest is on disk and can be sent later; the end is in time."""
    life = live(server, tmp_path, "auto", 0, 300)
    wait_for(life, lambda: has_rows(server))
    server.fault = fault
    if fault == "outage":
        server.stop()
    began = time.monotonic()
    said = finish(life)
    assert time.monotonic() - began < FINISH_S + 60  # of a busy machine; without W&B
    assert "W&B did not get everything; upload the rest with: wandb sync" in said
    server.fault = ""
    if fault == "outage":
        server.start()
    assert 0 < len(server.only_run().steps("train/loss")) < 300
    sync(server, said, tmp_path)
    assert_all_arrived(server, tmp_path)


@pytest.mark.parametrize(
    ("before", "after"), [("auto", "auto"), ("offline", "auto"), ("offline", "offline")]
)
def test_each_point_after_a_kill(server, tmp_path, before, after):
    """Of a run that is killed after 200 steps and goes on from its checkpoint at 150."""
    life = live(server, tmp_path, before, 0, 200)
    wait_for(life, (tmp_path / "waits").exists)
    if before == "auto":
        wait_for(life, lambda: has_rows(server))
    life.kill()
    life.wait()
    if before == "auto":  # what the killed run's uploader still holds has come
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < 2.5:
            if (now := len(server.only_run().history)) != seen:
                seen, since = now, time.monotonic()
            time.sleep(0.05)
    said = finish(live(server, tmp_path, after, 150, 230))
    if after == "offline":
        sync(server, said, tmp_path)
    assert_all_arrived(server, tmp_path, once=before == "offline")
    points = len(server.only_run().steps("train/loss"))
    assert points <= (231 if after == "auto" else 440)
