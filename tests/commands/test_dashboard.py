"""`vae_dist.dashboard`: the workspace as wandb-workspaces would send it."""

import json
import sys

import pytest

from vae_dist.dashboard import build, main


@pytest.mark.slow
def test_the_workspace_has_a_section_for_each_group_of_metrics():
    name = "wandb_workspaces.workspaces"
    workspaces = pytest.importorskip(name, reason="needs the extra dashboard")
    workspace = build(workspaces, entity="tester", project="p", name="View")
    spec = json.loads(workspace._to_model().spec.model_dump_json(by_alias=True))
    sections = spec["section"]["panelBankConfig"]["sections"]
    filled = [section["name"] for section in sections if section["panels"]]
    assert filled == ["Pictures", "Learning", "Latents", "Optimizer", "Machine"]


def test_without_the_package_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main([]) == 2
    assert "pip install 'vae_dist[dashboard]'" in capsys.readouterr().err
