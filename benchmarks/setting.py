"""What training benchmarks begin with: config, runtime, data, trainer, as a session makes them.

`train` runs the real loop on the real stream, with the sinks of a session; what a benchmark wants
to know or do between two batches goes `around` the stream. Shards that a config asks for and nobody
gave are made: the bundled digits, or smooth random pictures of a stated size.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vae_dist.config.load import load_train_config
from vae_dist.config.resolve import COMPILED, resolve
from vae_dist.config.schema import TrainConfig
from vae_dist.data.loader import Batch
from vae_dist.data.writer import write_shards
from vae_dist.distributed import Runtime
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.console import ConsoleSink
from vae_dist.tracking.sinks import JsonlSink
from vae_dist.tracking.wandb import WandbSink
from vae_dist.training.data import Data, resolved_with_data, training_stream
from vae_dist.training.loop import Trainer
from vae_dist.training.setup import build_trainer, machine_facts
from vae_dist.training.stop import RankWatch, StopRequest, StopSignals
from vae_dist.training.trackers import Trackers

# words of a run that does nothing but steps
QUIET = ("wandb.mode=disabled", "evaluation.every=0", "checkpoint.every=0", "training.steps=100000")


@dataclass(frozen=True)
class Setting:
    config: TrainConfig  # resolved
    runtime: Runtime
    data: Data


def make_setting(words: Sequence[str]) -> Setting:
    """Of a training command's words. Raises ConfigError."""
    config = load_train_config(list(words))
    runtime = Runtime.join(config.runtime)
    facts = machine_facts(config, runtime)
    config = resolve(config, facts)
    runtime.use_precision(config.training.precision)
    config, data = resolved_with_data(config, facts, runtime)
    return Setting(config, runtime, data)


class Enough(Exception):
    """Raised by what goes around the stream: the run is over before its last step."""


def train(
    setting: Setting,
    out: Path,
    around: Callable[[Trainer, Iterator[Batch]], Iterable[Batch]],
) -> Trainer:
    """Trains in the run folder `out` until the batches of `around` end; all ranks together.

    Console lines go nowhere, rows to log.jsonl and W&B as the config says. At the last step nothing
    is evaluated and no picture is made.
    """
    config, runtime, data = setting.config, setting.runtime, setting.data
    folder = RunFolder(out)
    folder.create()
    with open(os.devnull, "w") as nowhere:
        trackers = Trackers()
        if runtime.is_main:
            console = ConsoleSink(start_step=0, stop_step=config.training.steps, stream=nowhere)
            wandb = WandbSink(config, folder.path, say=lambda line: None)
            for sink in (console, JsonlSink(folder.log_path, resume_step=0), wandb):
                trackers.add(sink)
        trainer = build_trainer(config, runtime, folder, data, trackers)
        trainer.evaluator = lambda model, step, must_stop: {}
        trainer.image_logger = lambda model, step, metrics: None  # type: ignore[assignment]
        stop = StopRequest(runtime, StopSignals())
        with contextlib.closing(training_stream(config, runtime, data, 0)) as stream:
            with (
                contextlib.suppress(Enough),
                RankWatch(runtime, timeout_s=600, on_lost=lambda message, blamed: None) as watch,
            ):
                trainer.fit(around(trainer, iter(stream)), stop, watch)
            stop.settle()
        trainer.writer.wait()
        trackers.close("finished")
    return trainer


def is_compiled(config: TrainConfig) -> bool:
    """Whether the resolved config asks for torch.compile, so that a peer gets it too."""
    return config.runtime.compile in COMPILED


def is_channels_last(config: TrainConfig) -> bool:
    return config.runtime.channels_last == "true"


def synchronize(device: torch.device) -> None:
    """Wait for the device, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_data(
    words: Sequence[str], data: str, folder: Path, size: tuple[int, int] = (300, 280)
) -> list[str]:
    """The words, before them those for data.train and data.validation: of the folder `data` that
    `pack` wrote; where none was given, below `folder`, of the digits that the config brings along,
    or of synthetic JPEGs of (H, W)."""
    if not data and load_train_config(list(words)).data.bundled == "none":
        for part, count in (("train", 128), ("validation", 64)):
            write_shards(_pictures(count, size, part), folder / part, num_shards=4)
    return [*(f"data.{part}={data or folder}/{part}" for part in ("train", "validation")), *words]


def _pictures(count: int, size: tuple[int, int], part: str) -> Iterator[dict[str, str | bytes]]:
    """Colour clouds: as many bytes and as much decoding as a photograph, roughly."""
    random = np.random.default_rng(len(part))
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8))
        smooth = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + random.integers(-6, 7, smooth.shape, np.int16)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        yield {"__key__": f"{number:06d}", "jpg": file.getvalue()}
