"""What tracking costs: the time of a row against a training step, and of pictures on the way.

    python benchmarks/tracking.py [RUN_FOLDER]     (default: runs/mnist, a finished run)

In: a run folder, for its model and data. Out: medians over interleaved rounds: seconds of one
training step of that config, of `log()` of its last row into each sink, of what the trainer waits
for at a row (weights' copy, memory) and at pictures (the network's part), and of the part that the
picture thread takes over. W&B is offline: the service is not in the trainer's way in any mode. The
last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vae_dist.checkpoint import load_checkpoint
from vae_dist.config.schema import TrainConfig
from vae_dist.data.stream import Batch
from vae_dist.inference.load import open_images
from vae_dist.models.build import build_vae
from vae_dist.pictures import RunPainter
from vae_dist.runfolder import RunFolder
from vae_dist.runtime import Runtime
from vae_dist.tracking.history import read_rows
from vae_dist.tracking.machine import UpdateRatio, memory_row
from vae_dist.tracking.sinks import ConsoleSink, JsonlSink, WandbSink
from vae_dist.training.ema import Ema
from vae_dist.training.optimizer import build_optimizer
from vae_dist.training.step import TrainingStep

ROUNDS = 30


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def training_step(config: TrainConfig, runtime: Runtime, image_size: tuple[int, int]) -> Any:
    vae = build_vae(config, image_size).to(runtime.device)
    step = TrainingStep(
        config,
        runtime,
        wrapped=runtime.prepare(vae),
        vae=vae,
        optimizer=build_optimizer(vae, config.optimizer),
        ema=Ema(vae, decay=config.training.ema_decay),
    )
    shape = (config.training.batch_size, config.data.channels, *image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    return step, Batch(0, images, torch.zeros(shape[0], dtype=torch.int64), (), ())


def main() -> None:
    folder = RunFolder(sys.argv[1] if len(sys.argv) > 1 else "runs/mnist")
    config = folder.config()
    height, width = load_checkpoint(folder.checkpoints.folder, "latest").state["image_size"]
    runtime = Runtime.start(config.runtime, precision=config.training.precision)
    step, batch = training_step(config, runtime, (height, width))
    ratio = UpdateRatio(step.optimizer)
    last_row = [row for _, row in read_rows(folder.log_path)][-1]
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, open("/dev/null", "w") as nowhere:
        out = Path(name)
        config.wandb.mode = "offline"
        sinks = {
            "console": ConsoleSink(start_step=0, stop_step=1, stream=nowhere),
            "jsonl": JsonlSink(out / "log.jsonl", resume_step=0),
            "wandb": WandbSink(config, out, say=lambda line: None),
        }
        images = open_images(config, "", create=True)
        data: Any = SimpleNamespace(
            validation=images.index,
            settings=images.settings,
            image_size=(height, width),
            num_dims=config.data.channels * height * width,
        )
        painter = RunPainter(config, RunFolder(out), data, [], say=lambda line: None)
        painter(step.ema.module, 0, {})  # reads the images, once in a run
        for number in range(ROUNDS):
            took = {"step": seconds(lambda number=number: step(batch, number))}
            ratio.arm()
            armed = seconds(lambda number=number: (step(batch, number), ratio.row()))
            took["armed_step"] = armed
            took["memory_row"] = seconds(lambda: memory_row(runtime.device))
            for name, sink in sinks.items():
                took[name] = seconds(lambda s=sink, number=number: s.log(number + 1, last_row))
            if number % 5 == 0:
                took["pictures_network"] = seconds(lambda: painter(step.ema.module, 1, {}))
                took["pictures_drawing"] = seconds(lambda: drain(painter))
            for key, value in took.items():
                found.setdefault(key, []).append(value)
        painter.close()
        for sink in sinks.values():
            sink.close("finished")
    report(config, {key: statistics.median(values) for key, values in found.items()})


def drain(painter: RunPainter) -> None:
    """Wait for the picture thread; training does not."""
    while not painter.is_idle:
        time.sleep(0.001)


def report(config: TrainConfig, took: dict[str, float]) -> None:
    for key, value in took.items():
        print(f"{key:<18}{1e3 * value:10.3f} ms")
    row = took["memory_row"] + took["console"] + took["jsonl"] + took["wandb"]
    update = max(0.0, took["armed_step"] - took["step"])
    figures = {
        "config": config.config,
        "milliseconds": {key: round(1e3 * value, 4) for key, value in took.items()},
        "row_per_step": round(row / took["step"], 5),
        "update_ratio_per_step": round(update / took["step"], 5),
        f"every_{config.log.every}_steps": round(
            (row + update) / took["step"] / config.log.every, 6
        ),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
