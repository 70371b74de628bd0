"""`vae_dist.dashboard`: the workspace as wandb-workspaces would send it."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from vae_dist.dashboard import build, main

HAS_WORKSPACES = importlib.util.find_spec("wandb_workspaces") is not None


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WORKSPACES, reason="needs the extra dashboard")
def test_the_workspace_has_a_section_for_each_group_of_metrics() -> None:
    import wandb_workspaces.workspaces as ws

    workspace = build(ws, entity="tester", project="p", name="View")
    spec = workspace._to_model().spec.model_dump_json(by_alias=True)
    sections = json.loads(spec)["section"]["panelBankConfig"]["sections"]
    names = [section["name"] for section in sections if section["panels"]]
    assert names == ["Pictures", "Learning", "Latents", "Optimizer", "Machine"]
    assert "eval/neg_elbo_nats" in spec and "trainer/step" in spec


def test_without_the_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main([]) == 2
    assert "pip install 'vae_dist[dashboard]'" in capsys.readouterr().err
