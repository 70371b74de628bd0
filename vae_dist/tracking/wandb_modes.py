"""Whether a W&B run can be online, under which id, and which rows it has from before.

In: the config's wish, the environment, the run folder. Out: a mode, a reason in words why it is not
online, the run id that a resumed run goes on with, and the last steps that are recorded already.
Nothing here prompts, and each question to the network ends within seconds.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vae_dist.config.errors import ConfigError
from vae_dist.files import write_durably

_MODES = {
    "auto": "auto",
    "online": "online",
    "run": "online",  # wandb's older word
    "offline": "offline",
    "dryrun": "offline",  # wandb's older word
    "disabled": "disabled",
}
_PROBE_SECONDS = 3.0
_READ_SECONDS = 30.0


def asked_mode(configured: str) -> tuple[str, str]:
    """The mode and where it comes from; WANDB_MODE wins, as users of W&B expect."""
    asked = os.environ.get("WANDB_MODE")
    if not asked:
        return configured, "wandb.mode"
    if asked not in _MODES:
        raise ConfigError(
            f"WANDB_MODE={asked} is none of online, offline, disabled; unset it or set one of these"
        )
    return _MODES[asked], "WANDB_MODE"


def run_id_of(folder: Path, resume_step: int) -> tuple[str, bool]:
    """The W&B run id, and whether a run of that id may exist; a sweep agent chooses its own."""
    path = folder / "wandb_id"
    if given := os.environ.get("WANDB_RUN_ID"):
        write_durably(path, given.encode())
        return given, True
    if resume_step > 0 and path.exists():
        return path.read_text().strip(), True
    run_id = secrets.token_hex(4)
    write_durably(path, run_id.encode())
    return run_id, False


def obstacle_to_online(wandb: Any, asked: str) -> str:
    """Why no run can be sent to W&B from here, as a clause; "" when nothing is in the way."""
    try:
        settings = wandb.setup().settings
        if asked == "auto" and settings.mode in ("offline", "dryrun", "disabled"):
            return f"`wandb {settings.mode}` is set here"
        if not wandb.login(prompt=False, verify=False):
            return "nobody is logged in: run `wandb login` or set WANDB_API_KEY"
        if not _answers(settings.base_url):
            return f"{settings.base_url} does not answer"
    except Exception as error:  # malformed keys and settings raise errors of many kinds
        return f"the W&B login cannot be used: {first_line(error)}"
    return ""


def _answers(url: str) -> bool:
    """One GET through the environment's proxies; any answer counts, even one that TLS rejects."""
    try:
        urllib.request.urlopen(url, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return "SSL" in repr(error.reason)
    except (OSError, ValueError):
        return False
    return True


def first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def offline_summaries(folder: Path, run_id: str) -> Iterable[dict[str, Any]]:
    """The last value of every key, of each offline part of this run under `folder`/wandb.

    Read with W&B's own command, which also reads the torn file of a killed run. A part that it
    cannot read gives none.
    """
    for part in sorted((folder / "wandb").glob(f"offline-run-*-{run_id}")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json"]
        try:
            answer = subprocess.run(
                [*command, str(part)], capture_output=True, timeout=_READ_SECONDS, check=True
            )
            yield dict(json.loads(answer.stdout)["summary"])
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
            continue  # the points of this part may then be logged twice; no reason to stop
