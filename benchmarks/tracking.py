"""What tracking costs: the time of a row against a training step, and of pictures on the way.

    python -m benchmarks.tracking [key=value of vae_dist.train ...]

In: config=mnist. Out: medians over interleaved rounds (of the console, which has no line for most
of the rows that come so fast, the mean): seconds of one training step, of what the trainer does for
a row (sums, guards, times, memory), of `log()` of that row into each sink, of an update ratio,
which comes each 100 steps at most, and of pictures: the network's part, for which training waits,
and the part of the picture thread. W&B is offline: `log()` only queues, and
benchmarks/wandb_faults.py measures what its worker costs. The last line is one JSON object, with
the shares of a row per step and of pictures at the config's own cadence.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.setting import make_setting
from vae_dist.config.schema import TrainConfig
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.console import ConsoleSink
from vae_dist.tracking.sinks import JsonlSink
from vae_dist.tracking.throughput import Meter, UpdateRatio
from vae_dist.tracking.wandb import WandbSink
from vae_dist.training.data import training_stream
from vae_dist.training.setup import build_trainer
from vae_dist.training.step import StepReport
from vae_dist.training.trackers import Trackers

ROUNDS = 100


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    with tempfile.TemporaryDirectory() as name, open("/dev/null", "w") as nowhere:
        measure(Path(name), nowhere)


def measure(out: Path, nowhere: TextIO) -> None:
    shards = [f"data.{part}={out}/data/{part}" for part in ("train", "validation")]
    setting = make_setting(["config=mnist", "wandb.mode=offline", *shards, *sys.argv[1:]])
    config, runtime, data = setting.config, setting.runtime, setting.data
    folder = RunFolder(out / "run")
    folder.create()
    sinks = {
        "console": ConsoleSink(start_step=0, stop_step=1, stream=nowhere),
        "jsonl": JsonlSink(folder.log_path, resume_step=0),
        "wandb": WandbSink(config, folder.path, say=lambda line: None),
    }
    trainer = build_trainer(config, runtime, folder, data, Trackers())
    step, image_logger = trainer.training_step, trainer.image_logger
    ratio = UpdateRatio(step.optimizer)
    trainer._meter = Meter(total_steps=10**6)
    found: dict[str, list[float]] = {}
    row: dict[str, Any] = {}

    def make_row(report: StepReport) -> None:
        trainer._meter.step(config.training.batch_size)
        row.update(trainer._training_row(report))

    with contextlib.closing(training_stream(config, runtime, data, 0)) as stream:
        for number, batch in zip(range(ROUNDS), stream, strict=False):
            began = time.perf_counter()
            report = step(batch, number)
            took = {"step": time.perf_counter() - began}
            took["row"] = seconds(lambda report=report: make_row(report))
            for name, sink in sinks.items():
                took[name] = seconds(lambda s=sink, number=number: s.log(number + 1, row))
            if number % 10 == 5:
                time.sleep(0.05)  # the worker of W&B has nothing left to do
                took["update_ratio"] = seconds(lambda: measure_ratio(ratio, step.optimizer))
                took["pictures_network"] = seconds(lambda: image_logger(step.ema.module, 1, {}))
                took["pictures_drawing"] = seconds(image_logger._writer._queue.join)
            for key, value in took.items():
                found.setdefault(key, []).append(value)
    image_logger.close()
    for sink in sinks.values():
        sink.close("finished")
    medians = {key: statistics.median(values[1:]) for key, values in found.items()}
    medians["console"] = statistics.fmean(found["console"][1:])  # of fast rows most have no line
    report_figures(config, ratio.every, medians)


def measure_ratio(ratio: UpdateRatio, optimizer: torch.optim.Optimizer) -> None:
    """What an armed optimizer step does beside the step."""
    ratio.arm()
    ratio._copy(optimizer)
    ratio._compare(optimizer)
    ratio.row()


def report_figures(config: TrainConfig, ratio_every: int, took: dict[str, float]) -> None:
    for key, value in took.items():
        print(f"{key:<18}{1e6 * value:12.1f} us")
    row = took["row"] + took["console"] + took["jsonl"] + took["wandb"]
    row += took["update_ratio"] / ratio_every
    pictures = took["pictures_network"] / (took["step"] * config.evaluation.every)
    figures = {
        "config": config.config,
        "threads": torch.get_num_threads(),
        "microseconds": {key: round(1e6 * value, 1) for key, value in took.items()},
        "row_per_step": round(row / took["step"], 5),
        f"row_every_{config.log.every}_steps": round(row / took["step"] / config.log.every, 6),
        f"pictures_every_{config.evaluation.every}_steps": round(pictures, 5),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
