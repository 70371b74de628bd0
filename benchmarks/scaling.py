"""How much of its speed does a process keep when others train with it?

    python -m benchmarks.scaling [processes=1,2] [rounds=3] [steps=30] [warmup=360] [key=value ...]

Weak scaling: each process has the same number of images per step, `images` (default 64), so n
processes take steps of n times as many. Each arm is a real `accelerate launch` of this file with
that many processes (gloo and one thread each on a CPU, unless runtime.threads= says otherwise; NCCL
where there are GPUs); arms take turns, one round after the other. `n alone` are n launches of one
process at the same time, which share the machine but not a model: the limit that the hardware sets.
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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import finish, head, median_ratio, split_options, table
from benchmarks.setting import Enough, make_setting, synchronize, train
from vae_dist.cli import exit_process
from vae_dist.data.loader import Batch
from vae_dist.training.loop import Trainer

GOAL = 0.95
TIMEOUT_S = 900


# one process of an arm


def work(out: Path, options: dict[str, str], keys: list[str]) -> None:
    """Trains with the other processes of the launch; the main one writes images/s to `out`."""
    steps, warmup = int(options["steps"]), int(options["warmup"])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    words = [
        f"run={out.with_suffix('')}",
        f"training.batch_size={int(options['images']) * world}",
        "training.steps=100000",
        f"log.every={steps}",
        "wandb.mode=disabled",
        "evaluation.every=0",
        "checkpoint.every=0",
    ]
    setting = make_setting([*_defaults(keys), *words, *keys])
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
            "parameters": sum(p.numel() for p in setting_parameters(setting)),
        }
        out.write_text(json.dumps(facts))
    setting.runtime.stop()


def setting_parameters(setting: Any) -> Iterator[torch.nn.Parameter]:
    from vae_dist.models.build import build_vae

    with torch.device("meta"):
        return build_vae(setting.config, setting.data.image_size).parameters()


def _defaults(keys: list[str]) -> list[str]:
    words = [] if any(key.startswith("config=") for key in keys) else ["config=mnist"]
    return [*words, *([] if torch.cuda.is_available() else ["runtime.threads=1"])]


# the arms


def launch(processes: int, out: Path, words: list[str]) -> subprocess.Popen[bytes]:
    launcher = ["--num_machines", "1", "--num_processes", str(processes)]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if processes > 1:
        launcher += ["--multi_gpu", "--main_process_port", "0"]  # also on a CPU
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher]
    command += ["-m", "benchmarks.scaling", f"worker={out}", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def measure(folder: Path, name: str, launches: int, processes: int, words: list[str]) -> list[Any]:
    """What each launch's main process found."""
    outs = [folder / f"{name.replace(' ', '_')}-{number}.json" for number in range(launches)]
    running = [launch(processes, out, words) for out in outs]
    codes = [one.wait(timeout=TIMEOUT_S) for one in running]
    if any(codes):
        raise SystemExit(f"{name}: exit codes {codes}; the messages above say why")
    found = [json.loads(out.read_text()) for out in outs]
    for out in outs:
        out.unlink()
        shutil.rmtree(out.with_suffix(""), ignore_errors=True)
    return found


def main(arguments: list[str]) -> int:
    options, keys = split_options(
        arguments,
        {
            "processes": "1,2",
            "rounds": "3",
            "steps": "30",
            "warmup": "360",
            "images": "64",
            "worker": "",
        },
    )
    if options["worker"]:
        work(Path(options["worker"]), options, keys)
        return 0
    counts = [int(count) for count in options["processes"].split(",")]
    arms = {"1 process": (1, 1)}
    for count in counts:
        if count > 1:
            arms |= {f"{count} processes": (1, count), f"{count} alone": (count, 1)}
    facts = head("weak scaling: the same images per process and step")
    rates: dict[str, list[float]] = {name: [] for name in arms}
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="scaling.") as temporary:
        words = [f"{name}={options[name]}" for name in ("steps", "warmup", "images")]
        words += [f"data.{part}={temporary}/data/{part}" for part in ("train", "validation")]
        for _ in range(int(options["rounds"])):
            for name, (launches, processes) in arms.items():
                found = measure(Path(temporary), name, launches, processes, [*words, *keys])
                told = found[0]
                rates[name].append(sum(one["images_per_second"] for one in found))
    rows = []
    for name, (launches, processes) in arms.items():
        count = launches * processes
        efficiency = median_ratio(rates[name], rates["1 process"]) / count
        beside = rates.get(f"{count} alone") if processes > 1 else None
        rows.append(
            {
                "arm": name,
                "images_per_second": statistics.median(rates[name]),
                "efficiency": efficiency,
                "of_the_limit": median_ratio(rates[name], beside) if beside else None,
                "rounds": [round(rate, 1) for rate in rates[name]],
            }
        )
    print(f"  each process: {options['images']} images per step, {told}")
    titles = list(rows[0])
    print(table(titles, [["" if row[key] is None else row[key] for key in titles] for row in rows]))
    finish(
        facts, {"goal": GOAL, "images_per_process": int(options["images"]), **told, "arms": rows}
    )
    return 0


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
