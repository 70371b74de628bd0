"""Whether a W&B run can be online, and under which id.

In: the config's wish, the environment, the run folder. Out: a mode, a reason in words why it is not
online, and the run id that a resumed run goes on with. Nothing here prompts, and each question to
the network ends within seconds.
"""

from __future__ import annotations

import os
import secrets
import time
import urllib.error
import urllib.request
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
_PROBES = 2  # a gateway may fail once


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
        if problem := _no_service(settings.base_url):
            return f"{settings.base_url} {problem}"
    except Exception as error:  # malformed keys and settings raise errors of many kinds
        return f"the W&B login cannot be used: {first_line(error)}"
    return ""


def _no_service(url: str) -> str:
    """What is wrong with the service, as a predicate; "" when it answers.

    An empty question to its API through the environment's proxies. Any answer counts that is no
    server error, also a refusal and one that TLS rejects: wandb itself says more about these.
    """
    request = urllib.request.Request(
        f"{url}/graphql", b'{"query": ""}', {"Content-Type": "application/json"}
    )
    problem = ""
    for attempt in range(_PROBES):
        if attempt:
            time.sleep(1.0)
        try:
            urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return ""
            problem = f"answers with HTTP error {error.code}"
            continue
        except urllib.error.URLError as error:
            return "" if "SSL" in repr(error.reason) else "does not answer"
        except (OSError, ValueError):
            return "does not answer"
        return ""
    return problem


def first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
