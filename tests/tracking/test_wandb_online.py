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
        captions = (image["caption"].split(" |")[0] for image in found.values())
        assert list(captions) == [f"step {step}" for _, step in found]
        return losses == {step: row["train/loss"] for step, row in rows.items()} and files == images

    assert rows and images and server.wait(has_all) and not server.unknown, server.unknown
    if once:
        assert sorted(recorded.steps("train/loss")) == sorted(rows)


class Process:
    """Python with the settings that lead to the server; `finish` returns what it said."""

    def __init__(self, server, home, *words):
        self.process = subprocess.Popen(
            [sys.executable, *words],
            env=server.environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, condition):
        end = time.monotonic() + 180
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                pytest.fail(self.process.communicate()[0])
            time.sleep(0.02)

    def finish(self, *, code=0):
        said = self.process.communicate(timeout=400)[0]
        assert self.process.returncode == code, said
        return said


def sync(server, said, home):
    """Types the last `wandb sync` command that the trainer showed."""
    command = said.rpartition("with: wandb ")[2].splitlines()[0]
    Process(server, home, "-m", "wandb", *command.split()).finish()


def test_an_outage_that_passes_and_the_stop_button(server, tmp_path):
    for name in ("train", "validation"):
        write_images(tmp_path / name, random_pixels(16, 8, 8))
    run = tmp_path / "run"
    options = [o for o in arguments(run, tmp_path) if not o.startswith("wandb.mode")]
    options += ["training.steps=1000000", "evaluation.every=50", "log.every=10"]
    options += ["wandb.tags=[a, b]", "wandb.group=g"]
    training = Process(server, tmp_path, "-m", "vae_dist.train", *options)

    def sent():
        return [step for run in list(server.runs.values()) for step in run.steps("train/loss")]

    training.wait_for(sent)
    server.stop()
    reached = max(dict(read_rows(run / "log.jsonl")))
    training.wait_for(lambda: max(dict(read_rows(run / "log.jsonl"))) > reached + 100)
    server.start()
    training.wait_for(lambda: max(sent()) > reached + 100)
    recorded = server.only_run()
    server.stopped.add(recorded.id)
    said = training.finish(code=75)
    assert status(run)["status"] == "interrupted" and "interrupted at step" in said
    assert "did not get" not in said and "Traceback" not in said and recorded.complete
    assert_all_arrived(server, run, once=True)
    assert (recorded.name, recorded.tags, recorded.group) == ("run", ["a", "b"], "g")
    assert (recorded.project, recorded.exit_code) == ("vae_dist", 1)
    config = recorded.user_config
    assert (config["optimizer.lr"], config["training.steps"]) == (1e-3, 1000000)
    assert "vae_dist.train config=debug" in config["environment"]["command"]
    assert recorded.steps("latent/kl_nats_per_unit")[:2] == [50, 100]


# sinks alone, as training uses them; a life goes on where its stdin says so

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
    if step % 200 == 0:
        (folder / "waits").touch()
        sys.stdin.readline()
wandb.close("finished")
"""


def live(server, folder, mode, first, last):
    (folder / "waits").unlink(missing_ok=True)
    return Process(server, folder, "-c", LIFE, str(folder), mode, str(first), str(last))


def wait_for_rows(server, life):
    life.wait_for(lambda: any(run.history for run in list(server.runs.values())))


@pytest.mark.parametrize("fault", ["outage", "500", "hang"])
def test_a_fault_that_stays(server, tmp_path, fault):
    """What has arrived stays, the rest is on disk and can be sent later; the end is in time."""
    life = live(server, tmp_path, "auto", 0, 300)
    wait_for_rows(server, life)
    if fault == "outage":
        server.stop()
    elif fault == "hang":
        server.hang.set()
    else:
        server.fails = True
    began = time.monotonic()
    life.process.stdin.write("go on\n")
    life.process.stdin.flush()
    said = life.finish()
    assert time.monotonic() - began < FINISH_S + 60  # of a busy machine; without W&B
    assert "W&B did not get everything; upload the rest with: wandb sync" in said
    if fault == "outage":
        server.start()
    server.fails = False
    server.hang.clear()
    server.resume.set()
    assert 0 < len(server.only_run().steps("train/loss")) < 300
    sync(server, said, tmp_path)
    assert_all_arrived(server, tmp_path)


@pytest.mark.parametrize(
    ("before", "after"), [("auto", "auto"), ("offline", "auto"), ("offline", "offline")]
)
def test_each_point_after_a_kill(server, tmp_path, before, after):
    """Of a run that is killed after 200 steps and goes on from its checkpoint at 150."""
    life = live(server, tmp_path, before, 0, 200)
    life.wait_for((tmp_path / "waits").exists)
    if before == "auto":
        wait_for_rows(server, life)
    life.process.kill()
    life.process.wait()
    if before == "auto":  # what the killed run's uploader still holds has come
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < 2.5:
            if (now := len(server.only_run().history)) != seen:
                seen, since = now, time.monotonic()
            time.sleep(0.05)
    said = live(server, tmp_path, after, 150, 230).finish()
    if after == "offline":
        sync(server, said, tmp_path)
    assert_all_arrived(server, tmp_path, once=before == "offline")
    points = len(server.only_run().steps("train/loss"))
    assert points <= (231 if after == "auto" else 440)
