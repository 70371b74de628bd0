"""Where does a training step spend its time? The top costs of the real loop, named.

    python -m benchmarks.profile [config=mnist] [trace=FILE.json] [top=25] [steps=10] [warmup=20]
                                 [data=FOLDER] [key=value ...]

torch's profiler around `steps` steps of the Trainer that `train` builds, data and logging included.
data=FOLDER: photographs as `pack` writes them (else the config's digits, or synthetic JPEGs). Out:
operators by the time that they take themselves (device time where there is a GPU, else CPU time of
the main thread and what it waits for), their share of it, calls per step and the mean time of a
call; how much of the time no operator accounts for (Python, the loader), trace=FILE: a trace for
https://ui.perfetto.dev or chrome://tracing. The last line is a JSON object.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import finish, head, show, split_options
from benchmarks.setting import QUIET, Enough, make_setting, synchronize, train, with_data
from vae_dist.data.loader import Batch
from vae_dist.training.loop import Trainer


class Window:
    """Goes around the stream: `steps` steps after `warmup` others are profiled."""

    def __init__(self, *, warmup: int, steps: int, device: torch.device) -> None:
        self.warmup, self.steps, self.device = warmup, steps, device
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities, record_shapes=True)
        self.plain_s = self.profiled_s = 0.0  # of a step, without and with the profiler

    def around(self, trainer: Trainer, stream: Iterator[Batch]) -> Iterator[Batch]:
        for number, batch in enumerate(stream):
            if number == self.warmup:
                began = self._now()
            if number == self.warmup + self.steps:
                self.plain_s = (self._now() - began) / self.steps
                self.profiler.start()
                began = self._now()
            if number == self.warmup + 2 * self.steps:
                self.profiled_s = (self._now() - began) / self.steps
                self.profiler.stop()
                raise Enough
            yield batch

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def costs_of(profiler: profile, *, device: str, steps: int) -> list[dict[str, Any]]:
    """Operators by their own time, descending; milliseconds are of a step."""
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if getattr(event, key) > 0]
    total = sum(getattr(event, key) for event in events)
    events.sort(key=lambda event: -getattr(event, key))
    return [
        {
            "operator": event.key[:70],
            "ms": getattr(event, key) / 1e3 / steps,
            "share": getattr(event, key) / total,
            "calls": event.count / steps,
            "us_per_call": getattr(event, key) / event.count,
        }
        for event in events
    ]


def main(arguments: list[str]) -> int:
    options, keys = split_options(
        arguments, {"trace": "", "top": "25", "steps": "10", "warmup": "20", "data": ""}
    )
    steps, warmup = int(options["steps"]), int(options["warmup"])
    facts = head("the top costs of a training step")
    with tempfile.TemporaryDirectory(prefix="profile.") as temporary:
        words = [] if any(key.startswith("config=") for key in keys) else ["config=mnist"]
        words += [*QUIET, f"run={temporary}/run", *keys]
        setting = make_setting(with_data(words, options["data"], Path(temporary) / "data"))
        window = Window(warmup=warmup, steps=steps, device=setting.runtime.device)
        train(setting, Path(temporary) / "run", window.around)
    if options["trace"]:
        window.profiler.export_chrome_trace(options["trace"])
    device = setting.runtime.device.type
    costs = costs_of(window.profiler, device=device, steps=steps)
    inside, rows = sum(row["ms"] for row in costs), costs[: int(options["top"])]
    batch = setting.config.training.batch_size
    figures = {
        "config": setting.config.config,
        "precision": setting.config.training.precision,
        "threads": torch.get_num_threads(),
        "batch_size": batch,
        "step_ms": 1e3 * window.plain_s,
        "profiled_step_ms": 1e3 * window.profiled_s,
        "in_operators_ms": inside,
        "images_per_second": batch / window.plain_s,
    }
    print(
        f"  {figures['config']}, batch {batch}, precision {figures['precision']}, "
        f"{figures['threads']} threads: {figures['step_ms']:.2f} ms a step, profiled "
        f"{figures['profiled_step_ms']:.2f} ms, of which {inside:.2f} ms in operators"
    )
    show(rows)
    finish(facts, {**figures, "top": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
