"""`wandb agent` runs a trial of launch/sweep.yaml on the stand-in server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_run import random_pixels, write_images
from tests.support.training import rows, status
from tests.support.wandb_server import ENTITY, ROOT, WandbServer

OPTIONS = (
    "config=debug training.steps=4 optimizer.warmup_steps=1 log.num_images=4 "
    "training.batch_size=4 data.slots=4 data.workers=0 data.bundled=none runtime.threads=1 "
    "data.train=images data.validation=images wandb.project=p"
)
VALUES = {"optimizer.lr": 0.001, "objective.beta": 0.5}


def answer_agents(server, yaml):
    """What `wandb agent` asks for, of a sweep of one trial."""
    sweep = {"id": "U3dlZXA=", "name": "sweep", "state": "RUNNING", "method": "grid"}
    sweep |= {"config": yaml, "runs": {"edges": []}}
    trial = {"id": "trial", "run_id": "trial", "program": "", "type": "run"}
    trial["args"] = {key: {"value": value} for key, value in VALUES.items()}
    commands = [{"id": "end", "type": "exit"}, trial]  # the last one first

    def heartbeat(variables):
        now = [] if json.loads(variables["runState"]) else [commands.pop()]  # busy, or not
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(now)}}

    server.answers |= {
        "SweepWithRuns": lambda variables: {"project": {"sweep": sweep}},
        "CreateAgent": lambda variables: {"createAgent": {"agent": {"id": "QWdlbnQ="}}},
        "Heartbeat": heartbeat,
    }


@pytest.mark.slow
def test_a_trial_has_its_values_and_its_folder(tmp_path):
    write_images(tmp_path / "images", random_pixels(16, 8, 8))
    text = (ROOT / "launch" / "sweep.yaml").read_text()
    assert text.count("config=mnist") == 1
    with WandbServer() as server:
        environment = server.environment(tmp_path)
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        answer_agents(server, text.replace("config=mnist", OPTIONS))
        pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        command = [sys.executable, "-m", "wandb", "agent", f"{ENTITY}/p/sweep"]
        agent = subprocess.run(command, cwd=tmp_path, env=environment, timeout=300, **pipes)
        folder, run = tmp_path / "runs" / "sweep" / "trial", server.runs["trial"]
    assert agent.returncode == 0, agent.stderr
    assert status(folder)["status"] == "finished" and (run.complete, run.exit_code) == (True, 0)
    assert {key: run.config[key] for key in VALUES} == VALUES
    assert sorted(set(run.steps("train/loss"))) == [1, 2, 3, 4] == sorted(rows(folder))
    assert "eval/neg_elbo_nats" in run.summary  # what the sweep looks at
