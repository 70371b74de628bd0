from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest
import torch

from vae_dist.tracking import environment
from vae_dist.tracking.environment import add_session, describe_environment, read_sessions


def test_what_a_session_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    words = ["/usr/bin/python3", "-m", "vae_dist.train", "config=mnist", "x.api_key=hidden"]
    monkeypatch.setattr(sys, "orig_argv", words)
    record = describe_environment(first_step=5, world=2, device=torch.device("cpu"))
    assert record["command"] == "python3 -m vae_dist.train config=mnist x.api_key=..."
    assert (record["first_step"], record["processes"]) == (5, 2)
    assert record["variables"]["SLURM_JOB_ID"] == "77"
    assert "k" * 40 not in json.dumps(record)


def test_a_launcher_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parent:
        def parent(self) -> Parent:
            return self

        def cmdline(self) -> list[str]:
            return ["/venv/bin/python", "/venv/bin/accelerate", "launch", "-m", "vae_dist.train"]

    monkeypatch.setattr(psutil, "Process", Parent)
    assert environment.launch_command() == "accelerate launch -m vae_dist.train"


def test_sessions_of_a_requeued_run_and_of_one_that_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    assert read_sessions(path) == []
    for first_step in (0, 100, 100, 200):
        add_session(path, {"first_step": first_step})
    assert [session["first_step"] for session in read_sessions(path)] == [0, 100, 100, 200]
    add_session(path, {"first_step": 0})
    assert [session["first_step"] for session in read_sessions(path)] == [0]
