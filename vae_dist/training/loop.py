"""The training loop: step, log, evaluate, checkpoint, stop.

A run stands at one integer, the number of optimizer steps done. Row k of the log, checkpoint k and
evaluation k belong to the state after k steps. Everything that may depend on history and is not a
tensor is in `Trainer.scalars()`: a handful of named numbers, equal on all ranks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from vae_dist.checkpoint import Checkpoint
from vae_dist.config.schema import TrainConfig
from vae_dist.data.stream import Batch
from vae_dist.models.likelihoods import bits_per_dim
from vae_dist.runfolder import RunFolder
from vae_dist.runtime import Runtime
from vae_dist.tracking.machine import UpdateRatio, memory_row
from vae_dist.tracking.metrics import Value
from vae_dist.tracking.sinks import ConsoleSink, Sink
from vae_dist.tracking.throughput import Meter
from vae_dist.training.guard import NonFiniteGuard, TrainingFailed
from vae_dist.training.optimizer import load_optimizer_tensors, optimizer_tensors
from vae_dist.training.preemption import StopRequest
from vae_dist.training.step import StepReport, TrainingStep

Row = dict[str, Value]


class Evaluator(Protocol):
    """Metrics of the averaged model, the same on every rank; None when a stop was agreed on."""

    def __call__(self, model: nn.Module, stop_requested: Callable[[], bool]) -> Row | None: ...


class Painter(Protocol):
    """Draws picture grids of the averaged model. Called on the main process alone."""

    def __call__(self, model: nn.Module, step: int, metrics: Row) -> None: ...

    def close(self) -> None:
        """Wait, not for ever, for what is still being written."""
        ...


def is_due(step: int, every: int, last_step: int) -> bool:
    """Every `every` steps and after the last one; every=0 means after the last one alone."""
    return step == last_step or (every > 0 and step > 0 and step % every == 0)


class Trainer:
    """Holds the state of a run on one rank and moves it to the last step."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        folder: RunFolder,
        *,
        training_step: TrainingStep,
        num_samples: int,
        num_dims: int,
        sinks: Iterable[Sink],
        console: ConsoleSink | None,
        evaluator: Evaluator,
        painter: Painter,
        identity: dict[str, Any],
        peak_images_per_second: float = 0.0,
    ) -> None:
        self.config, self.runtime, self.folder = config, runtime, folder
        self.training_step = training_step
        self.num_samples, self.num_dims = num_samples, num_dims  # of an epoch, of an image
        self.console = console  # on the main process
        self.sinks, self.evaluator, self.painter = list(sinks), evaluator, painter
        self.identity = identity  # what a checkpoint must agree with: data, image size
        self.peak_images_per_second = peak_images_per_second  # of one device; 0: not known
        self._update_ratio = UpdateRatio(training_step.optimizer)
        self.step = 0
        self.guard = NonFiniteGuard(
            runtime.device, max_consecutive=config.training.max_consecutive_nonfinite
        )
        self._saved_step = -1
        self._evaluated_step = -1
        self._skipped_before = 0  # skipped samples over all ranks, before this process started
        self._skipped_here = 0  # on this rank since
        self._named_samples: set[tuple[str, int]] = set()
        self._last_row: Row = {}
        self._pending_row: Row = {}  # of a step whose evaluation was interrupted

    # the loop

    def fit(self, batches: Iterable[Batch], stop: StopRequest) -> str:
        """Train to the last step; "finished", or "interrupted" after a stop with a checkpoint.

        Raises TrainingFailed when the numbers or the data make it pointless to go on.
        """
        last_step = self.config.training.steps
        meter = Meter(
            total_steps=last_step,
            first_step=self.step,
            world=self.runtime.world,
            peak_images_per_second=self.peak_images_per_second,
        )
        was_interrupted = self.step > 0 and self._evaluation_is_due()
        if was_interrupted and not self._evaluate(self._pending_row, stop):
            return "interrupted"
        stream = iter(batches)
        while self.step < last_step:
            with meter.data_wait():
                batch = next(stream)
            if is_due(self.step + 1, self.config.log.every, last_step):
                self._update_ratio.arm()
            report = self.training_step(batch, self.step)
            self.guard.observe(self.step, report.found_inf, batch.shards)
            self._count_skipped(batch)
            self.step += 1
            meter.step(len(batch.images))
            self._advance()
            row = self._training_row(report, meter) if self._log_is_due() else {}
            if not self._evaluate_and_log(row, meter, stop):
                return self._interrupt()
            if is_due(self.step, self.config.checkpoint.every, last_step):
                with meter.pause():
                    self.save()
            if self.step < last_step and stop.agreed():
                return self._interrupt()
        return "finished"

    def _evaluate_and_log(self, row: Row, meter: Meter, stop: StopRequest) -> bool:
        """False when a stop was agreed on during the evaluation."""
        if self._evaluation_is_due():
            with meter.pause():
                return self._evaluate(row, stop)
        if row:
            self._log(row)
        return True

    def _evaluate(self, row: Row, stop: StopRequest) -> bool:
        model = self.training_step.ema.module
        metrics = self.evaluator(model, stop.agreed)
        if metrics is None:
            self._pending_row = row
            return False
        self._evaluated_step, self._pending_row = self.step, {}
        self._log(row | metrics)
        every = self.config.log.images_every or self.config.evaluation.every
        if self.runtime.is_main and is_due(self.step, every, self.config.training.steps):
            self.painter(model, self.step, metrics)
        return True

    def _interrupt(self) -> str:
        self.save()
        return "interrupted"

    def _log_is_due(self) -> bool:
        return is_due(self.step, self.config.log.every, self.config.training.steps)

    def _evaluation_is_due(self) -> bool:
        due = is_due(self.step, self.config.evaluation.every, self.config.training.steps)
        return due and self._evaluated_step != self.step

    # rows

    def _training_row(self, report: StepReport, meter: Meter) -> Row:
        """The row of this step: means over the global batch, so a function of the step alone."""
        self.guard.check()
        local = [report.loss_sum, report.distortion_sum, report.rate_sum]
        sums = torch.stack([t.double() for t in local])
        count = torch.tensor([float(self._skipped_here)], dtype=torch.float64, device=sums.device)
        totals = self.runtime.sum_over_ranks(torch.cat([sums, count])).tolist()
        batch_size = self.config.training.batch_size
        loss, distortion, rate = (total / batch_size for total in totals[:3])
        skipped = self._check_skipped(int(totals[3]))
        num_dims = self.num_dims
        level_nats = self.training_step.vae.likelihood.nats_to_level_nats(
            distortion + rate, num_dims
        )
        images_seen = self.step * batch_size
        row: Row = {
            "train/loss": loss,
            "train/neg_elbo_nats": distortion + rate,
            "train/distortion_nats": distortion,
            "train/rate_nats": rate,
            "train/bits_per_dim": bits_per_dim(level_nats, num_dims=num_dims),
            "train/beta": report.beta,
            "optim/lr": report.lr,
            "optim/grad_norm": float(report.grad_norm),
            "optim/skipped_steps": float(self.guard.skipped),
            "data/images_seen": float(images_seen),
            "data/epoch": images_seen / self.num_samples,
            "data/skipped_samples": float(skipped),
        }
        if self.training_step.loss_scale.enabled:
            row["optim/loss_scale"] = float(self.training_step.loss_scale.scale)
        row |= self._update_ratio.row()
        return row | meter.row() | memory_row(self.runtime.device)

    def _log(self, row: Row) -> None:
        self._last_row |= row
        if self.runtime.is_main:
            for sink in self.sinks:
                sink.log(self.step, row)

    def _advance(self) -> None:
        if self.console is not None:
            self.console.advance(self.step)

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.say(text)
        else:  # a rank other than the main one
            print(text, file=sys.stderr)

    # damaged samples

    def _count_skipped(self, batch: Batch) -> None:
        self._skipped_here += len(batch.skipped)
        for lost in batch.skipped:
            if (lost.shard, lost.index) not in self._named_samples:
                self._named_samples.add((lost.shard, lost.index))
                self.say(f"warning: step {batch.step}: cannot read {lost}")

    def _check_skipped(self, skipped_here: int) -> int:
        skipped = self._skipped_before + skipped_here
        # of an epoch at least: one bad sample in the first batch is no reason to stop
        seen = max(self.step * self.config.training.batch_size, self.num_samples)
        limit = self.config.data.max_skipped_fraction
        if skipped > limit * seen:
            raise TrainingFailed(
                f"{skipped} of {seen} samples could not be read (data.max_skipped_fraction="
                f"{limit}); the warnings above name them. Mend the shards, or raise the limit"
            )
        return skipped

    # checkpoints

    def save(self) -> None:
        """Write checkpoint `step`, once. Every rank takes part; the main process writes."""
        if self._saved_step == self.step:
            return
        skipped = self.runtime.sum_over_ranks(
            torch.tensor(float(self._skipped_here), dtype=torch.float64)
        )
        if self.runtime.is_main:
            step = self.training_step
            tensors = {
                "model": step.vae.state_dict(),
                "ema": step.ema.module.state_dict(),
                "optimizer": optimizer_tensors(step.optimizer, step.vae),
            }
            state = {
                **self.identity,
                "scalars": self.scalars(int(skipped)),
                "pending_row": self._pending_row,
            }
            self.folder.checkpoints.save(
                self.step, tensors, state, keep_last=self.config.checkpoint.keep_last
            )
        self._saved_step = self.step

    def scalars(self, skipped_here: int) -> dict[str, float]:
        return {
            **self.guard.state(),
            **self.training_step.loss_scale.state(),
            "skipped_samples": self._skipped_before + skipped_here,
            "evaluated_step": self._evaluated_step,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of this run, written on any number of ranks."""
        step, scalars = self.training_step, checkpoint.state["scalars"]
        step.vae.load_state_dict(checkpoint.tensors["model"])
        step.ema.module.load_state_dict(checkpoint.tensors["ema"])
        load_optimizer_tensors(step.optimizer, step.vae, checkpoint.tensors["optimizer"])
        self.guard.load_state(scalars)
        step.loss_scale.load_state(scalars)
        self._skipped_before = scalars["skipped_samples"]
        self._evaluated_step = scalars["evaluated_step"]
        self._pending_row = checkpoint.state["pending_row"]
        self.step = self._saved_step = checkpoint.step

    def summary(self) -> str:
        """The figures of the last evaluation in one line."""
        value = self._last_row.get("eval/neg_elbo_nats", math.nan)
        bits = self._last_row.get("eval/bits_per_dim", math.nan)
        return f"-ELBO {value:.2f} nats, {bits:.3f} bits/dim"
