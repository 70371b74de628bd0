"""What a command imports before it answers: torch and trackers only where they are needed."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest

from vae_dist import train

WATCHED = ("torch", "accelerate", "wandb", "webdataset", "sympy", "torch._dynamo")


def imported_by(*argv: str, module: str = "vae_dist.train", folder) -> tuple[set[str], int]:
    """Which of the watched modules a command has imported at its end, and its exit code."""
    code = (
        "import json, sys\n"
        f"from {module} import main\n"
        f"code = main({list(argv)!r})\n"
        f"names = [name for name in {WATCHED!r} if name in sys.modules]\n"
        "print('\\n' + json.dumps([names, code]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True
    )
    names, exit_code = json.loads(result.stdout.splitlines()[-1])
    return set(names), exit_code


@pytest.fixture(autouse=True)
def _package_is_found(monkeypatch, request):
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))


@pytest.mark.parametrize("module", ["vae_dist.train", "vae_dist.evaluate", "vae_dist.sample"])
def test_help_needs_no_torch(module, tmp_path):
    assert imported_by("--help", module=module, folder=tmp_path) == (set(), 0)


def test_config_errors_need_no_torch(tmp_path):
    found = imported_by("config=mnist", "optimizer.rate=1", folder=tmp_path)
    assert found == (set(), 2)


@pytest.mark.parametrize(
    ("overrides", "rank", "loaded", "said"),
    [
        ((), "0", False, "config debug: loading torch ...\n"),
        ((), "1", False, ""),
        ((), "0", True, ""),
        (("optimizer.rate=1",), "0", False, None),
    ],
)
def test_training_says_what_it_waits_for(overrides, rank, loaded, said, monkeypatch, capsys):
    """On the main process, where torch is not loaded yet, once the config is found right."""
    session = types.ModuleType("vae_dist.training.setup")
    heard = []
    session.run_session = lambda *_: heard.append(capsys.readouterr()) or 0
    monkeypatch.setitem(sys.modules, "vae_dist.training.setup", session)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    code = train.main(["config=debug", *overrides])
    assert [(shown.out, shown.err) for shown in heard] == ([] if said is None else [("", said)])
    assert code == (2 if said is None else 0)
    assert "loading torch" not in capsys.readouterr().err


def test_dry_run_imports_no_tracker(tmp_path):
    found, code = imported_by("config=mnist", "dry_run=true", folder=tmp_path)
    assert code == 0
    assert "torch" in found
    assert not found & {"wandb", "torchvision"}
