"""The training loop: step, log, evaluate, checkpoint, stop.

A run stands at one integer, the number of optimizer steps done. Row k of the log, checkpoint k and
evaluation k belong to the state after k steps. What may depend on history and is no tensor is in
`Trainer.scalars()`: a handful of named numbers, equal on all ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psutil
from torch import Tensor

from vae_dist.data.loader import Batch
from vae_dist.distributed import load_full
from vae_dist.models.vae import VAE
from vae_dist.run.checkpoint import DISCRIMINATOR, Checkpoint, CheckpointWriter
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.metrics import Value
from vae_dist.tracking.throughput import Meter, memory_row
from vae_dist.training.data import Data
from vae_dist.training.guards import DamageGuard, SkipGuard, check_equal_over_ranks
from vae_dist.training.images import ImageLogger
from vae_dist.training.memory import keep_freed_memory, memory_explained
from vae_dist.training.plan import peak_images_per_second
from vae_dist.training.step import StepReport, TrainingStep
from vae_dist.training.stop import RankWatch, StopRequest, TrainingFailed
from vae_dist.training.trackers import Trackers

Row = dict[str, Value]
# (averaged model, step, whether to stop) -> metrics, the same on every rank; None after a stop
Evaluator = Callable[[VAE, int, Callable[[], bool]], Row | None]
UPDATE_S = 5.0  # longer than an update takes


def is_due(step: int, every: int, last_step: int) -> bool:
    """Every `every` steps and after the last one; every=0 means after the last one alone."""
    return step == last_step or (every > 0 and step > 0 and step % every == 0)


class Trainer:
    """Holds the state of a run on one rank and moves it to the last step."""

    def __init__(
        self,
        training_step: TrainingStep,
        folder: RunFolder,
        data: Data,
        trackers: Trackers,
        *,
        evaluator: Evaluator,
        image_logger: ImageLogger,
    ) -> None:
        self.training_step, self.folder, self.data = training_step, folder, data
        self.config, self.runtime = training_step.config, training_step.runtime
        self.trackers, self.say = trackers, trackers.say
        self.evaluator, self.image_logger = evaluator, image_logger
        config, runtime = self.config, self.runtime
        self.step, self.last_step = 0, config.training.steps
        # a run of which every update was skipped has failed, however short it is
        most = min(config.training.max_consecutive_nonfinite, config.training.steps)
        self.guard = SkipGuard(runtime.device, max_consecutive=most)
        self.damage = DamageGuard(
            limit=config.data.max_skipped_fraction,
            num_samples=data.train.num_samples,
            warn=self.say,
        )
        self.writer = CheckpointWriter(
            folder.checkpoints, keep_last=config.checkpoint.keep_last, warn=self.say
        )
        self._peak = peak_images_per_second(config, data, runtime)
        self._saved = (-1, -1)  # the step, and the last evaluated one, of the last checkpoint
        self._evaluated_step = -1
        self._best: tuple[float, int] | None = None  # lowest eval/neg_elbo_nats, and its step
        self._row: Row = {}  # of this step, not logged yet
        self._last_row: Row = {}

    # the loop

    def fit(self, batches: Iterable[Batch], stop: StopRequest, watch: RankWatch) -> str:
        """Train to the last step; "finished", or "interrupted" after a stop with a checkpoint.

        Raises TrainingFailed when numbers or data make it pointless to go on.
        """
        self._stop, self._watch = stop, watch
        self._first_step = self.step + 1
        self._meter = Meter(self.last_step, self.step, self.runtime.world, self._peak)
        stream = iter(batches)
        while True:
            evaluates = self._evaluation_is_due()  # at the start: what was interrupted
            if not evaluates:
                self._log({})
            self._save_if_due()  # also before an evaluation, which may fail
            if evaluates:
                if not self._evaluate():
                    return self._end("interrupted")
                self._save_if_due()  # the checkpoint of this step does not know of its evaluation
            if self.step == self.last_step:
                return self._end("finished")
            if self.step > 0 and stop.agreed():
                return self._end("interrupted")
            self._train_step(self._next(stream))

    def _next(self, stream: Iterator[Batch]) -> Batch:
        self._watch.at(self.step, "data")
        with self._meter.data_wait():
            return next(stream)

    def _train_step(self, batch: Batch) -> None:
        self._watch.at(self.step, "step", frozenset(g.images.shape[-2:] for g in batch.groups))
        with memory_explained("training.microbatch_size"):
            report = self.training_step(batch, self.step)
        self.guard.observe(report.found_inf, report.spike, batch.shards)
        self.damage.observe(batch)
        self.step += 1
        self.training_step.is_whole = True
        self._meter.step(batch.num_images)
        self._advance()
        self._watch.at(self.step, "log")
        self._check_health(report)
        if is_due(self.step, self.config.log.every, self.last_step):
            self._row = self._training_row(report)

    def _advance(self) -> None:
        self.trackers.advance(self.step)
        if self.step == self._first_step:  # of this process
            if self.runtime.is_main:
                seconds = time.time() - psutil.Process().create_time()
                self.say(f"first step after {seconds:.1f} s")
            if self.runtime.device.type == "cpu":
                keep_freed_memory()  # once the loader processes run

    def _evaluate(self) -> bool:
        """Evaluate and log; False when a stop was agreed on meanwhile."""
        with self._meter.pause(), memory_explained("evaluation.batch_size"):
            model: Any = self.training_step.ema.module
            metrics = self.evaluator(model, self.step, self._evaluation_must_stop)
            if metrics is None:
                return False
            self._evaluated_step = self.step
            value: Any = metrics.get("eval/neg_elbo_nats", math.nan)
            is_best = self._best is None or value < self._best[0]
            if self.config.checkpoint.keep_best and is_best and math.isfinite(value):
                self._best = (value, self.step)
            self._log(metrics)
            self._watch.at(self.step, "images")
            every = self.config.log.images_every or self.config.evaluation.every
            if self.runtime.is_main and is_due(self.step, every, self.last_step):
                with self.trackers.warned_of("images", self.step):
                    self.image_logger(model, self.step, metrics)
        return True

    def _evaluation_must_stop(self) -> bool:
        self._watch.at(self.step, "evaluation")
        return self._stop.agreed()

    def _end(self, status: str) -> str:
        """Of an interruption that the disk does not take a warning tells: an older one is there."""
        if not self._save_for_good() and status == "finished":
            problem = self.runtime.broadcast(self.writer.problem)
            raise TrainingFailed(
                f"all {self.step} steps are done but {problem}; free space, then the same "
                "command goes on from the last checkpoint"
            )
        return status

    def _evaluation_is_due(self) -> bool:
        due = is_due(self.step, self.config.evaluation.every, self.last_step)
        return due and self._evaluated_step != self.step

    def _checkpoint_is_due(self) -> bool:
        is_best = self._best is not None and self._best[1] == self.step
        return is_best or is_due(self.step, self.config.checkpoint.every, self.last_step)

    # health

    def _check_health(self, report: StepReport) -> None:
        """What stops a run, looked at when it is due; the same answer on every rank."""
        if self.step % self.guard.max_consecutive == 0 or self._checkpoint_is_due():
            self.guard.check(self.runtime, report.grad_norm, step=self.step)
        if is_due(self.step, self.config.training.checksum_every, -1):
            self._check_weights()

    def _check_weights(self) -> None:
        weights, self.training_step.is_whole = self.training_step.weights_of_every_rank(), False
        check_equal_over_ranks(self.runtime, weights, step=self.step)
        self.training_step.is_whole = True  # what ranks differ in is not worth keeping

    # rows

    def _training_row(self, report: StepReport) -> Row:
        """The row of this step: means over the global batch, so a function of the step alone."""
        config, step, batch_size = self.config, self.training_step, self.config.training.batch_size
        totals = self.runtime.sum_numbers(list(report.sums.values()), self.damage.here)
        sums = dict(zip(report.sums, totals, strict=False))
        images_seen = self.step * batch_size
        self.damage.check(int(totals[-1]), images_seen)
        nats = sums["train/distortion_nats"] + sums["train/rate_nats"]
        # over the whole batch, whose images may differ in shape
        bits = step.vae.likelihood.bits_per_dim(nats, int(sums.pop("num_dims")))
        means = {name: total / batch_size for name, total in sums.items()}
        neg_bound = means.pop("train/neg_bound_nats")
        row: Row = {
            **means,
            "train/neg_elbo_nats": means["train/distortion_nats"] + means["train/rate_nats"],
            "train/beta": report.beta,
            "optim/lr": report.lr,
            "optim/grad_norm": float(report.grad_norm),
            "optim/skipped_steps": float(self.guard.skipped),
            "optim/spike_steps": float(self.guard.spikes),
            "data/images_seen": float(images_seen),
            "data/epoch": images_seen / self.data.train.num_samples,
            "data/skipped_samples": float(self.damage.total),
            "time/checkpoint_stall_seconds": self.writer.stall_s,  # since this process started
            **{name: float(value) for name, value in report.shared.items()},
        }
        if config.objective.importance_samples > 1:
            row["train/neg_iwae_nats"] = neg_bound
        if bits is not None:
            row["train/bits_per_dim"] = bits
        if step.loss_scale.enabled:
            row["optim/loss_scale"] = float(step.loss_scale.scale)
        return row | self._meter.row() | memory_row(self.runtime.device)

    def _log(self, metrics: Row) -> None:
        """One row a step: what training has left, and these."""
        row, self._row = self._row | metrics, {}
        if row:
            self._last_row |= row
            self.trackers.log(self.step, row)

    def summary(self) -> str:
        """The figures of the last evaluation in one line."""
        value = self._last_row.get("eval/neg_elbo_nats", math.nan)
        bits = self._last_row.get("eval/bits_per_dim")
        return f"-ELBO {value:.2f} nats" + ("" if bits is None else f", {bits:.3f} bits/dim")

    # checkpoints

    def _save_if_due(self) -> None:
        if self._checkpoint_is_due() or self._saved[0] == self.step:
            self._watch.at(self.step, "checkpoint")
            with self._meter.pause():
                self.save()

    def save(self) -> None:
        """Hand checkpoint `step` to the writer, once; after its evaluation its state, again. Every
        rank takes part."""
        if self._saved == (self.step, self._evaluated_step):
            return
        if self.config.training.checksum_every and self._saved[0] != self.step:
            self._check_weights()
        (self.damage.since,) = map(int, self.runtime.sum_numbers([], self.damage.here))
        self._save()

    def _save_for_good(self) -> bool:
        """Whether the disk has this step's checkpoint; one that it refused is tried once more."""
        self._stop.settle()
        self._watch.at(self.step, "last checkpoint")  # comes once, so the watch does not time it
        for _ in range(2):
            self.save()
            if self.runtime.on_main(
                lambda: self.writer.wait() and self.writer.written_step == self.step
            ):
                return True
            self._saved = (-1, -1)
        return False

    def save_what_is_whole(self, agreed: bool) -> None:
        """Save the last step that is done, after whatever has ended the run. Not where its weights
        may be ruined: amid an update, in a streak of skipped steps, where ranks differ.

        A thread may call it, while the main one waits for a rank that is gone, so it sends no
        message unless all ranks have `agreed` to end.
        """
        end = time.monotonic() + UPDATE_S
        while not self.training_step.is_whole and time.monotonic() < end:
            time.sleep(0.01)
        is_sound = self.training_step.is_whole and not self.guard.streak
        can_save = self.runtime.strategy.forward_is_local or agreed
        if self._saved[0] != self.step > 0 and is_sound and can_save:
            self._save()
            if self.runtime.is_main and self.writer.wait():
                self.say(f"step {self.step} is saved; the same command goes on from there")
        self.writer.wait()

    def _save(self) -> None:
        scalars, best_step = self.scalars(), self._best and self._best[1]
        state = {**self.data.identity, "scalars": scalars, "pending_row": self._row}
        has_tensors = self._saved[0] == self.step
        self._saved = (self.step, self._evaluated_step)
        groups = {} if has_tensors else self.training_step.tensors()
        full_state = self.runtime.strategy.full_state
        tensors = {name: full_state(group) for name, group in groups.items()}
        if not self.runtime.is_main:
            return
        if has_tensors:
            self.writer.amend(self.step, state, best_step=best_step)
            return
        # in a streak of skipped steps the last good weights may be in an older one
        keep_all = scalars["skip_streak"] > 0
        self.writer.submit(self.step, tensors, state, best_step=best_step, keep_all=keep_all)

    def scalars(self) -> dict[str, Any]:
        best, best_step = self._best or (None, None)
        return {
            **self.guard.state(),
            **self.training_step.scalars(),
            "best_neg_elbo_nats": best,
            "best_step": best_step,
            "skipped_samples": self.damage.total,
            "evaluated_step": self._evaluated_step,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of this run, of any number of ranks. Sends no message."""
        scalars = checkpoint.state["scalars"]
        self.training_step.load(checkpoint.tensors, scalars)
        self.guard.load_state(scalars)
        self.damage.before = scalars["skipped_samples"]
        self._evaluated_step = scalars["evaluated_step"]
        self._row = checkpoint.state["pending_row"]
        self.step = self.writer.written_step = checkpoint.step
        self._saved = (self.step, self._evaluated_step)
        if scalars["best_step"] is not None:
            self._best = (scalars["best_neg_elbo_nats"], scalars["best_step"])

    def initialize(self, weights: dict[str, Tensor]) -> None:
        """Begin with these weights, of the model's names and shapes, and with those of the
        discriminator where there are some."""
        own = {k: v for k, v in weights.items() if not k.startswith(DISCRIMINATOR)}
        load_full(self.training_step.vae, own)
        self.training_step.ema.load(own)
        others = {k.removeprefix(DISCRIMINATOR): v for k, v in weights.items() if k not in own}
        if others and self.training_step.adversary is not None:
            load_full(self.training_step.adversary.network, others)
