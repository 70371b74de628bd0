"""A training session: from a config to a Trainer in its run folder, and to an exit code.

The order is: join the ranks; take the run folder; agree with the run that is in it; index the
data; build model, step and sinks; restore the newest checkpoint; train. Whatever can be refused is
refused before the model is built. Only the main process writes; its errors reach all ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vae_dist.checkpoint import Checkpoint
from vae_dist.config import checks
from vae_dist.config.errors import ConfigError
from vae_dist.config.load import adopt_automatic, changed_numbers
from vae_dist.config.schema import TrainConfig
from vae_dist.data.bundled import make_digits
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.stream import EvaluationStream, TrainingStream
from vae_dist.evaluation.run import evaluate
from vae_dist.models.build import build_vae
from vae_dist.models.vae import VAE
from vae_dist.pictures import RunPainter
from vae_dist.runfolder import EXIT_INTERRUPTED, RunFolder, RunLock
from vae_dist.runtime import Runtime, has_accelerator
from vae_dist.tracking.sinks import ConsoleSink, JsonlSink, Sink, WandbSink
from vae_dist.training.ema import Ema
from vae_dist.training.guard import TrainingFailed
from vae_dist.training.loop import Row, Trainer
from vae_dist.training.optimizer import build_optimizer
from vae_dist.training.preemption import StopRequest
from vae_dist.training.step import TrainingStep


@dataclass(frozen=True)
class Data:
    """What the shards hold. `identity` ties a run to them: it is kept in each checkpoint."""

    train: ShardIndex
    validation: ShardIndex
    image_size: tuple[int, int]  # H, W

    @property
    def identity(self) -> dict[str, Any]:
        return {"image_size": list(self.image_size), "train_data": self.train.fingerprint}


def run_session(config: TrainConfig) -> int:
    """Train, or go on, or say that nothing is left to do. Returns the exit code."""
    if hasattr(faulthandler, "register"):
        import signal

        faulthandler.register(signal.SIGUSR2, all_threads=True)  # kill -USR2: where does it hang?
    config.training.precision = checks.resolved_precision(
        config, has_accelerator=has_accelerator(config.runtime)
    )
    runtime = Runtime.start(config.runtime, precision=config.training.precision)
    try:
        if problem := checks.world_size_problem(checks.slots(config), runtime.world):
            raise ConfigError(problem)
        folder = RunFolder(config.run)
        if config.dry_run:
            return _dry_run(config, runtime)
        with _locked(folder, runtime):
            return _train(config, runtime, folder)
    finally:
        runtime.stop()
