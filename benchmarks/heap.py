"""What does it save on a CPU to keep freed memory in the process (keep_freed_memory of
vae_dist/training/memory.py)?

    python -m benchmarks.heap [seconds=60] [turn_s=2] [data=FOLDER] [image_pixels=64]
        [key=value ...]

Two processes train the same config in turns, each in the trainer, data loading included. `kept` is
what training does; `returned` leaves glibc as it is. Keys are those of a training run (default
config=mnist). data=FOLDER: photographs as `pack` writes them, else synthetic JPEGs of
`image_pixels` a side, or the bundled digits where the config asks for those. Out: images/s, pages
that the kernel handed out per step, the largest resident memory; the ratio is the median over turns
of `kept` to `returned`. The last line is a JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import vae_dist.training.loop
from benchmarks.report import finish, head, median_ratio, split_options, table
from benchmarks.setting import Enough, make_setting, shards, train
from benchmarks.turns import Arm, Finished, Turn, take_turns
from vae_dist.config.load import load_train_config
from vae_dist.data.loader import Batch
from vae_dist.training.loop import Trainer

OPTIONS = {"seconds": "60", "turn_s": "2", "data": "", "image_pixels": "64", "arm": ""}
QUIET = ("wandb.mode=disabled", "evaluation.every=0", "checkpoint.every=0", "training.steps=100000")
ARMS = ("kept", "returned")


def run_arm(folder: Path, keys: list[str]) -> None:
    """An arm's process: the trainer, until its turns are over."""
    if folder.name == "returned":
        vae_dist.training.loop.keep_freed_memory = lambda: None
    setting = make_setting([*keys, f"run={folder}/run"])
    turn = Turn(num_images_per_step=setting.config.training.batch_size)

    def around(trainer: Trainer, stream: Iterator[Batch]) -> Iterator[Batch]:
        turn.ready(
            threads=torch.get_num_threads(),
            precision=setting.config.training.precision,
            batch_size=setting.config.training.batch_size,
        )
        before = _pages()
        for step, batch in enumerate(stream):
            try:
                turn.before_step()
            except Finished as finished:
                found = {
                    "pages_per_step": (_pages() - before) / max(1, step),
                    "largest_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                }
                Path(finished.path or os.devnull).write_text(json.dumps(found))
                raise Enough from None
            yield batch

    train(setting, folder / "run", around)


def _pages() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main(arguments: list[str]) -> int:
    options, keys = split_options(arguments, OPTIONS)
    if options["arm"]:
        run_arm(Path(options["arm"]), keys)
        return 0
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        raise SystemExit("unset GLIBC_TUNABLES and MALLOC_*_: with them nothing is kept")
    facts = head("memory that a step frees: kept, or given back")
    words = [] if any(key.startswith("config=") for key in keys) else ["config=mnist"]
    words += [*QUIET, *keys]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="heap.") as temporary:
        folder, side = Path(temporary), int(options["image_pixels"])
        if load_train_config(words).data.bundled == "none":
            words += shards(options["data"], folder / "data", size=(side, side))
        else:
            words += [f"data.{part}={folder}/data/{part}" for part in ("train", "validation")]
        arms = []
        try:
            for name in ARMS:
                command = [sys.executable, "-m", "benchmarks.heap", f"arm={folder}/{name}", *words]
                log = folder / f"{name}.log"
                arms.append(Arm(name, command, threads=0, log=log))
            turn_s = float(options["turn_s"])
            for _ in take_turns(arms, seconds=turn_s, turn_s=turn_s):  # not measured
                pass
            for arm in arms:
                arm.rates = []
            for _ in take_turns(arms, seconds=float(options["seconds"]), turn_s=turn_s):
                pass
            for arm in arms:
                arm.finish(folder / f"{arm.name}.json")
                found = json.loads((folder / f"{arm.name}.json").read_text())
                rate = statistics.median(arm.rates)
                rows.append({"arm": arm.name, "images_per_second": rate, **found})
        finally:
            for arm in arms:
                arm.close()
    ratio = median_ratio(arms[0].rates, arms[1].rates)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    turns = sorted(a / b for a, b in zip(arms[0].rates, arms[1].rates, strict=True))
    print(f"  {arms[0].options}: kept / returned {ratio:.3f} ({turns[0]:.2f} to {turns[-1]:.2f})")
    finish(facts, {"rows": rows, "ratio": ratio, "turns": turns, "options": arms[0].options})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
