"""`vae_dist.dashboard` saves its workspace on the stand-in server."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.wandb_server import WandbServer
from vae_dist.dashboard import main

ROOT = Path(__file__).resolve().parents[2]
HAS_WORKSPACES = importlib.util.find_spec("wandb_workspaces") is not None


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WORKSPACES, reason="needs the extra dashboard")
def test_the_workspace_is_saved(tmp_path: Path) -> None:
    with WandbServer() as server:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        own = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        answer = subprocess.run(
            [sys.executable, "-m", "vae_dist.dashboard", "project=p", "entity=tester", "name=View"],
            env=clean | own | server.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert answer.returncode == 0, answer.stderr
        assert "workspace 'View' of tester/p" in answer.stdout
        (view,) = server.views.values()
    spec = json.loads(view["spec"])
    sections = spec["section"]["panelBankConfig"]["sections"]
    names = [section["name"] for section in sections if section["panels"]]
    assert names == ["Pictures", "Learning", "Latents", "Optimizer", "Machine"]
    assert "eval/neg_elbo_nats" in view["spec"] and "trainer/step" in view["spec"]


def test_without_the_package_the_extra_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main([]) == 2
    assert "pip install 'vae_dist[dashboard]'" in capsys.readouterr().err
