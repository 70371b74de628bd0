"""What a command imports before it answers: torch and trackers only where they are needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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


def test_dry_run_imports_no_tracker_and_no_compiler(tmp_path):
    found, code = imported_by("config=mnist", "dry_run=true", folder=tmp_path)
    assert code == 0
    assert "torch" in found
    assert not found & {"wandb", "sympy", "torch._dynamo"}
