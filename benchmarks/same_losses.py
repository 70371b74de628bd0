"""Does a device train as the CPU does? The first losses of a run on both, in float32.

    python -m benchmarks.same_losses [configs=debug,mnist] [devices=cpu,auto] [steps=50] [key=value]

In: configs of the bundled digits, which are cut at one half: each device would draw other grey
levels. Each trains `steps` steps on each device, without TensorFloat-32.
Out: the largest relative difference of train/loss to the first device's, and what it is at the last
step; the last line is a JSON object, and the exit code 1 where a difference is above LIMIT.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import finish, head, show, split_options
from vae_dist.tracking.sinks import read_rows

LIMIT = 1e-3  # relative
FIXED = (
    "training.precision=no", "runtime.compile=false", "log.every=1", "evaluation.every=0",
    "checkpoint.every=0", "wandb.mode=disabled", "likelihood.binarization=threshold",
)  # fmt: skip


def losses(config: str, device: str, folder: Path, words: list[str]) -> list[float]:
    """train/loss of each step, of a process of its own."""
    run = folder / f"{config}-{device}"
    keys = [f"config={config}", f"runtime.device={device}", f"run={run}", *FIXED, *words]
    keys += [f"data.{part}={folder}/data/{part}" for part in ("train", "validation")]
    subprocess.run([sys.executable, "-m", "vae_dist.train", *keys], check=True)
    rows = (row for _, row in read_rows(run / "log.jsonl"))
    return [row["train/loss"] for row in rows if "train/loss" in row]


def main(arguments: list[str]) -> int:
    options, words = split_options(
        arguments, {"configs": "debug,mnist", "devices": "cpu,auto", "steps": "50"}
    )
    facts = head("the same losses on two devices")
    words.append(f"training.steps={options['steps']}")
    first, second = options["devices"].split(",")
    rows = []
    with tempfile.TemporaryDirectory(prefix="losses.") as temporary:
        for config in options["configs"].split(","):
            expected, found = (
                losses(config, device, Path(temporary), words) for device in (first, second)
            )
            differences = [abs(b / a - 1) for a, b in zip(expected, found, strict=True)]
            rows.append(
                {"config": config, "steps": len(found), "largest": max(differences),
                 "last": differences[-1], "last_loss": found[-1]}
            )  # fmt: skip
    show(rows)
    finish(facts, {"devices": [first, second], "limit": LIMIT, "rows": rows})
    return int(any(row["largest"] > LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
