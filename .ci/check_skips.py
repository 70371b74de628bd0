"""A test may be skipped only for something that this machine lacks.

In: files with pytest's output, made with `-rs`. Out: one line per skip without a good reason, exit
code 1 if there is one. A good reason starts with a prefix of `lacking()` that holds here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = re.compile(r"^SKIPPED \[\d+\] (?P<place>.*?\.py(?::\d+)?): (?P<reason>.*)$")


def lacking() -> dict[str, bool]:
    """Prefix of a skip reason: whether this machine really lacks it."""
    import torch

    # Exit code 1: no package that could be installed would help.
    slurm = subprocess.run(["bash", ROOT / "tests/support/slurm/lacks.sh"], capture_output=True)
    extras = ("wandb_workspaces", "tensorboard")
    has_extras = all(importlib.util.find_spec(name) is not None for name in extras)
    browsers = ("chromium", "chromium-browser", "google-chrome")
    return {
        "needs the extra": not has_extras,
        "needs headless Chromium": not any(shutil.which(name) for name in browsers),
        "needs CUDA": not torch.cuda.is_available(),
        "needs several GPUs": torch.cuda.device_count() < 2,
        "needs a user other than root": os.geteuid() == 0,
        "needs a SLURM cluster": slurm.returncode == 1,
        "needs the cgroup v1 freezer": not os.access(
            "/sys/fs/cgroup/freezer/cgroup.procs", os.W_OK
        ),
    }


def unjustified(output: str, lacks: dict[str, bool]) -> list[str]:
    """The skips of `output` that this machine gives no reason for."""
    allowed = tuple(prefix for prefix, holds in lacks.items() if holds)
    return [
        f"{match['place']}: {match['reason']}"
        for line in output.splitlines()
        if (match := SKIPPED.match(line)) and not match["reason"].startswith(allowed)
    ]


def main() -> int:
    lacks = lacking()
    found = [line for name in sys.argv[1:] for line in unjustified(Path(name).read_text(), lacks)]
    print(
        "\n".join(["skipped, but this machine could run:", *found] if found else ["no idle skips"])
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
