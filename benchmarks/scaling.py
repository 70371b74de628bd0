"""How much of its speed does a process keep when others train with it?

    python -m benchmarks.scaling [processes=2] [rounds=3] [steps=30] [warmup=360] [key=value ...]

Weak scaling: each process has the same number of images per step, `images` (default 64), so n
processes take steps of n times as many. Arms take turns, one round after the other: one process, n
of one training (gloo and one thread each on a CPU, unless runtime.threads= says otherwise; NCCL
where there are GPUs), and n trainings of one process at the same time, which share the machine but
not a model: the limit that the hardware sets.
Before the clock starts come `warmup` steps: processes decode what they keep (`data.cache_bytes`)
when they first see it, and one of two sees half of an epoch's images.
Keys are those of a training run (default config=mnist; its digits are made where they are missing).
Out: images/s, and the efficiency, images/s of a process over those of a process alone: medians over
rounds. The last line is a JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import finish, head, median_ratio, show, split_options
from benchmarks.setting import QUIET, Enough, make_setting, synchronize, train
from vae_dist.cli import exit_process
from vae_dist.data.loader import Batch
from vae_dist.training.loop import Trainer

GOAL = 0.95
TIMEOUT_S = 900
OPTIONS = {
    "processes": "2",
    "rounds": "3",
    "steps": "30",
    "warmup": "360",
    "images": "64",
    "worker": "",
}


# one process of an arm


def work(out: Path, options: dict[str, str], keys: list[str]) -> None:
    """Trains with the other processes of the launch; the main one writes images/s to `out`."""
    steps, warmup = int(options["steps"]), int(options["warmup"])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    words = [] if any(key.startswith("config=") for key in keys) else ["config=mnist"]
    words += [] if torch.cuda.is_available() else ["runtime.threads=1"]
    words += [*QUIET, f"run={out.with_suffix('')}", f"log.every={steps}"]
    words += [f"training.batch_size={int(options['images']) * world}"]
    setting = make_setting([*words, *keys])
    assert setting.runtime.world == world, (setting.runtime.world, world)
    took: list[float] = []

    def around(trainer: Trainer, stream: Iterator[Batch]) -> Iterator[Batch]:
        device, began = setting.runtime.device, 0.0
        for number, batch in enumerate(stream):
            if number in (warmup, warmup + steps):
                synchronize(device)
                took.append(time.perf_counter() - began)
                began = time.perf_counter()
            if number == warmup + steps:
                raise Enough
            yield batch

    train(setting, out.with_suffix(""), around)
    if setting.runtime.is_main:
        images = steps * int(options["images"]) * world
        facts = {
            "images_per_second": images / took[1],
            "threads": torch.get_num_threads(),
            "device": setting.runtime.device.type,
            "precision": setting.config.training.precision,
        }
        out.write_text(json.dumps(facts))
    setting.runtime.stop()


# the arms


def start(
    out: Path, *, rank: int, world: int, port: int, words: list[str]
) -> subprocess.Popen[bytes]:
    """One process, in the environment that a launcher gives it."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {key: str(value) for key, value in values.items() if world > 1}
    command = [sys.executable, "-m", "benchmarks.scaling", f"worker={out}", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def measure(folder: Path, name: str, trainings: int, world: int, words: list[str]) -> list[Any]:
    """What each training's main process found."""
    outs = [folder / f"{name.replace(' ', '_')}-{number}.json" for number in range(trainings)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [(out, rank) for out in outs for rank in range(world)]
    running = [start(out, rank=k, world=world, port=port, words=words) for out, k in ranks]
    codes = [one.wait(timeout=TIMEOUT_S) for one in running]
    if any(codes):
        raise SystemExit(f"{name}: exit codes {codes}; the messages above say why")
    found = [json.loads(out.read_text()) for out in outs]
    for out in outs:
        out.unlink()
        shutil.rmtree(out.with_suffix(""), ignore_errors=True)
    return found


def main(arguments: list[str]) -> int:
    options, keys = split_options(arguments, OPTIONS)
    if options["worker"]:
        work(Path(options["worker"]), options, keys)
        return 0
    count = int(options["processes"])
    arms = {"1 process": (1, 1), f"{count} processes": (1, count), f"{count} alone": (count, 1)}
    facts = head("weak scaling: the same images per process and step")
    rates: dict[str, list[float]] = {name: [] for name in arms}
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="scaling.") as temporary:
        words = [f"{name}={options[name]}" for name in ("steps", "warmup", "images")]
        words += [f"data.{part}={temporary}/data/{part}" for part in ("train", "validation")]
        for _ in range(int(options["rounds"])):
            for name, (trainings, world) in arms.items():
                found = measure(Path(temporary), name, trainings, world, [*words, *keys])
                told = found[0]
                rates[name].append(sum(one["images_per_second"] for one in found))
    one = rates["1 process"]
    rows = [
        {
            "arm": name,
            "images_per_second": statistics.median(rates[name]),
            "efficiency": median_ratio(rates[name], one) / (trainings * world),
            "rounds": [round(rate, 1) for rate in rates[name]],
        }
        for name, (trainings, world) in arms.items()
    ]
    print(f"  each process: {options['images']} images per step, {told}")
    show(rows)
    finish(
        facts, {"goal": GOAL, "images_per_process": int(options["images"]), **told, "arms": rows}
    )
    return 0


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
