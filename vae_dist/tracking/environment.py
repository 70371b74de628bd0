"""Where a run comes from: the command, the code, the versions and the machine of each session.

In: this process. Out: a record for `environment.json` of the run folder, for W&B and the report; a
requeued run has one for each session, in order. Of the environment's variables only those named
here are kept, so that no secret gets in.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from vae_dist.files import write_durably

PACKAGES = ("vae_dist", "torch", "accelerate", "webdataset", "wandb", "numpy", "omegaconf")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "GOMP_SPINCOUNT",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_PARTITION",
    "SLURM_NODELIST",
    "SLURM_RESTART_COUNT",
)
_GIT_SECONDS = 5.0
_SECRET = re.compile(r"^([^=]*(?:api_?key|token|password|secret)[^=]*)=.*", re.I | re.S)


def describe_environment(*, first_step: int, world: int, device: torch.device) -> dict[str, Any]:
    """The record of this session, which begins at step `first_step` on `world` processes."""
    device_name = platform.processor() or platform.machine()
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "first_step": first_step,
        "command": launch_command(),
        "folder": os.getcwd(),
        "git": _git(Path(__file__).resolve().parent),
        "host": socket.gethostname(),
        "processes": world,
        "device": f"{device.type} ({device_name})",
        "cores": os.cpu_count() or 0,
        "system": platform.platform(),
        "versions": versions(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            found[name] = "not installed"
    found["cuda"] = torch.version.cuda or "none"
    return found


def launch_command() -> str:
    """What was typed: the launcher's command line where one started this process, else ours."""
    words = [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process().parent()
        above = parent.cmdline() if parent is not None else []
        for place, word in enumerate(above[:3]):
            if Path(word).name in ("accelerate", "torchrun"):
                words = [Path(word).name, *above[place + 1 :]]
                break
    return shlex.join(re.sub(_SECRET, r"\1=...", word) for word in words)


def _git(folder: Path) -> dict[str, Any]:
    """Commit of the code, and whether files differ from it; empty outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.check_output(
            command, text=True, timeout=_GIT_SECONDS, stderr=subprocess.DEVNULL
        ).strip()

    try:
        # A package in site-packages may lie inside somebody else's repository.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "changed": changed}
    except (OSError, subprocess.SubprocessError):
        return {}


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """The records of `environment.json`; none where it is missing or torn."""
    try:
        return list(json.loads(path.read_bytes())["sessions"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def add_session(path: Path, record: dict[str, Any]) -> None:
    """Append a record; a session at step 0 begins the run anew."""
    earlier = read_sessions(path) if record["first_step"] > 0 else []
    text = json.dumps({"sessions": [*earlier, record]}, indent=1) + "\n"
    write_durably(path, text.encode())
