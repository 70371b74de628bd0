"""Where a run comes from: the command, the code, the versions and the machine of each session.

In: this process. Out: a record for `environment.json` of the run folder, for W&B and the report; a
requeued run has one for each session, in order. Of the environment's variables only those named
here are kept, and of addresses what is no secret.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
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

from vae_dist.files import read_json, redacted, write_durably

PACKAGES = ("vae_dist", "torch", "accelerate", "webdataset", "wandb", "numpy")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
SLURM_VARIABLES = ("JOB_ID", "JOB_NAME", "JOB_PARTITION", "NODELIST", "RESTART_COUNT")
_LARGEST = 2**24  # bytes of environment.json


def describe_environment(*, first_step: int, world: int, device: torch.device) -> dict[str, Any]:
    """The record of this session, which begins at step `first_step` on `world` processes."""
    names = [*VARIABLES, *(f"SLURM_{name}" for name in SLURM_VARIABLES)]
    device_name = platform.processor() or platform.machine()
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "first_step": first_step,
        "command": launch_command(),
        "folder": os.getcwd(),
        "git": _git(Path(__file__).resolve().parents[2]),
        "host": socket.gethostname(),
        "processes": world,
        "device": f"{device.type} ({device_name})",
        "cores": os.cpu_count() or 0,
        "system": platform.platform(),
        "versions": versions(),
        "variables": {name: os.environ[name] for name in names if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Of Python, of the packages that decide numbers, and of CUDA."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            found[name] = "not installed"
    return found | {"cuda": torch.version.cuda or "none"}


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
    return shlex.join(map(redacted, words))


def _git(checkout: Path) -> str:
    """Commit of the code, with -dirty where files differ from it; empty outside a checkout."""
    if not (checkout / ".git").exists():  # site-packages may lie inside another repository
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=5.0)
        return answer.stdout.strip()
    return ""


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """The records of `environment.json`; none where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return [dict(session) for session in read_json(path, _LARGEST)["sessions"]]
    return []


def add_session(path: Path, record: dict[str, Any]) -> None:
    """Append a record; a session at step 0 begins the run anew."""
    earlier = read_sessions(path) if record["first_step"] > 0 else []
    text = json.dumps({"sessions": [*earlier, record]}, indent=1) + "\n"
    write_durably(path, text.encode())
