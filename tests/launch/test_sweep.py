"""`wandb agent` runs launch/sweep.yaml on the stand-in server; a preempted trial goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.tiny_run import random_pixels, write_images
from tests.support.training import rows, status
from tests.support.wandb_server import ENTITY, ROOT, WandbServer

STEPS = 400  # seconds: the signal finds the trial still training
OPTIONS = (
    f"config=debug training.steps={STEPS} evaluation.every={STEPS} log.num_images=4 "
    "training.batch_size=4 data.slots=4 data.workers=0 data.bundled=none runtime.threads=1 "
    "data.train=images data.validation=images wandb.project=p"
)
VALUES = {"optimizer.lr": 0.001, "objective.beta": 0.5}


def answer_agents(server, yaml):
    """What `wandb agent` asks for, of a sweep of one trial. Returns how the trial was handed out:
    "run", then "resume" each time that it was preempted (it said so and failed)."""
    starts = []
    sweep = {"id": "U3dlZXA=", "name": "sweep", "state": "RUNNING", "method": "grid"}
    sweep |= {"config": yaml, "runs": {"edges": []}}
    arguments = {key: {"value": value} for key, value in VALUES.items()}

    def next_command():
        run = server.runs.get("trial")
        if run is None and not starts:
            starts.append("run")
        elif run is not None and run.complete and run.exit_code and run.preempting:
            run.preempting = run.complete = False
            starts.append("resume")
        else:
            return {"id": "end", "type": "exit"}
        told = {"id": "trial", "run_id": "trial", "program": "", "args": arguments}
        return told | {"type": starts[-1]}

    def heartbeat(variables):
        commands = [] if json.loads(variables["runState"]) else [next_command()]
        answer = {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}
        return {"agentHeartbeat": answer}

    server.answers |= {
        "SweepWithRuns": lambda variables: {"project": {"sweep": sweep}},
        "CreateAgent": lambda variables: {"createAgent": {"agent": {"id": "QWdlbnQ="}}},
        "Heartbeat": heartbeat,
    }
    return starts


@pytest.mark.slow
def test_a_preempted_trial_goes_on_in_its_folder(tmp_path):
    write_images(tmp_path / "images", random_pixels(16, 8, 8))
    text = (ROOT / "launch" / "sweep.yaml").read_text()
    assert text.count("config=mnist") == 1
    with WandbServer() as server:
        environment = server.environment(tmp_path)
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        starts = answer_agents(server, text.replace("config=mnist", OPTIONS))
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "wandb", "agent", f"{ENTITY}/p/sweep"]
        agent = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=subprocess.STDOUT, **pipes
        )
        folder = tmp_path / "runs" / "sweep" / "trial"
        end = time.monotonic() + 180
        while not (folder / "log.jsonl").exists() or len(rows(folder)) < 20:
            assert agent.poll() is None and time.monotonic() < end, agent.communicate()[0]
            time.sleep(0.05)
        os.kill(int((folder / "lock").read_text().split()[1]), signal.SIGUSR1)
        said = agent.communicate(timeout=300)[0]
        assert agent.returncode == 0, said
        assert starts == ["run", "resume"], said
        run = server.runs["trial"]
        assert status(folder)["status"] == "finished"
        assert (run.complete, run.exit_code) == (True, 0)
        assert {key: run.config[key] for key in VALUES} == VALUES
        steps = sorted(set(run.steps("train/loss")))
        assert steps == list(range(1, STEPS + 1)) == sorted(rows(folder))
        assert "eval/neg_elbo_nats" in run.summary  # what the sweep looks at
        sessions = json.loads((folder / "environment.json").read_text())["sessions"]
        assert len(sessions) == 2
