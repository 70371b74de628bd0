import json
import sys
from types import SimpleNamespace as Process

import psutil
import torch

from vae_dist.tracking.environment import add_session, describe_environment, read_sessions


def test_what_a_session_records(monkeypatch):
    for name, value in (("SLURM_JOB_ID", "77"), ("WANDB_API_KEY", "s3c"), ("SLURM_JWT", "s3c")):
        monkeypatch.setenv(name, value)
    words = ["/usr/bin/python3", "-m", "vae_dist.train", "config=mnist", "x.api_key=s3cret"]
    monkeypatch.setattr(sys, "orig_argv", [*words, "data.train=https://me:s3cret@host/a.tar"])
    record = describe_environment(first_step=5, world=2, device=torch.device("cpu"))
    assert record["command"].startswith("python3 -m vae_dist.train config=mnist x.api_key=... data")
    assert (record["first_step"], record["processes"]) == (5, 2)
    assert record["variables"]["SLURM_JOB_ID"] == "77" and "s3c" not in json.dumps(record)
    typed = ["/venv/bin/python", "/venv/bin/accelerate", "launch", "-m", "vae_dist.train"]
    parent = Process(cmdline=lambda: typed)
    monkeypatch.setattr(psutil, "Process", lambda: Process(parent=lambda: parent))
    record = describe_environment(first_step=5, world=2, device=torch.device("cpu"))
    assert record["command"] == "accelerate launch -m vae_dist.train"


def test_sessions_of_a_requeued_run_and_of_one_that_begins_anew(tmp_path):
    path = tmp_path / "environment.json"
    for text in ("", '{"sessions": [{"first', '{"sessions": 3}', '{"sessions": [3]}', "[" * 10**5):
        path.write_text(text)
        assert read_sessions(path) == []
    for first_step in (0, 100, 100, 200):
        add_session(path, {"first_step": first_step})
    assert [session["first_step"] for session in read_sessions(path)] == [0, 100, 100, 200]
    add_session(path, {"first_step": 0})
    assert [session["first_step"] for session in read_sessions(path)] == [0]
