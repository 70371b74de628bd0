"""A training session: from a config to a Trainer in its run folder, and to an exit code.

The order is: join the ranks; agree with the run that is in the folder; take the folder; choose the
newest checkpoint; index the data; build model, step and sinks; restore; train. Whatever can be
refused is refused before the model is built, by all ranks with the same words, whichever rank found
it. Only the main process writes, as long as it lives.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch

from vae_dist.config.errors import CommandFailed, ConfigError
from vae_dist.config.resolve import COMPILED, Facts, resolve, world_size_problem
from vae_dist.config.schema import TrainConfig
from vae_dist.data.sources import is_remote
from vae_dist.data.workers import deaths_explained
from vae_dist.distributed import RankFailed, Runtime, computes_bf16, has_accelerator
from vae_dist.evaluation.run import evaluate
from vae_dist.files import printable
from vae_dist.inference.load import Images
from vae_dist.models.build import build_vae
from vae_dist.models.latent import STATISTICS_FILE, write_statistics
from vae_dist.models.networks import lpips_available
from vae_dist.models.vae import VAE
from vae_dist.run.checkpoint import DISCRIMINATOR, Checkpoint, Tensors
from vae_dist.run.folder import RunFolder, RunLock
from vae_dist.run.resume import (
    as_in_run_folder,
    check_identity,
    initial_weights,
    is_finished,
    newest_checkpoint,
)
from vae_dist.tracking.console import say
from vae_dist.training.compile import compile_towers, compiler_problem
from vae_dist.training.data import Data, resolved_with_data, training_stream
from vae_dist.training.images import ImageLogger
from vae_dist.training.loop import Row, Trainer
from vae_dist.training.memory import largest_that_fits, largest_that_runs, step_cost
from vae_dist.training.plan import dry_run, plan
from vae_dist.training.step import TrainingStep
from vae_dist.training.stop import (
    EXIT_INTERRUPTED,
    RankWatch,
    StopRequest,
    StopSignals,
    TrainingFailed,
)
from vae_dist.training.trackers import Trackers

LOCK_PAUSE_S = 0.5  # between two looks at a lock whose holder may be ending
LOADER_REMEDY = (
    "lower data.workers or data.cache_bytes, or ask for more memory; then the same command goes on "
    "from its last checkpoint"
)
Ending = tuple[int, list[str]]  # exit code, and what the main process says at last


def run_session(config: TrainConfig, signals: StopSignals) -> int:
    """Train, or go on, or say that nothing is left to do. Returns the exit code."""
    with contextlib.suppress(OSError):  # a notebook's stderr may be no file
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # kill -USR2: where does it hang?
    try:
        runtime = Runtime.join(config.runtime)
    except RankFailed as failure:
        say(f"failed: {failure}", sys.stderr)
        return 1
    with contextlib.ExitStack() as leaving:
        leaving.callback(runtime.stop)
        folder = RunFolder(config.run)
        config = runtime.on_all_ranks(lambda: _agreed_config(config, folder, world=runtime.world))
        facts = machine_facts(config, runtime)
        config = runtime.on_all_ranks(lambda: resolve(config, facts))
        runtime.on_all_ranks(lambda: runtime.use_precision(config.training.precision))
        if config.dry_run:
            code, lines = _dry_run(config, facts, runtime)
        else:
            code, lines = Session(config, facts, runtime, folder, signals).run()
        for line in lines if runtime.is_main else ():
            say(line)
        if code != 1:
            # Ranks leave after the main process has written all: srun and elastic agents end
            # those that are left. After a failure a rank may be gone, so there is no barrier.
            with contextlib.suppress(RuntimeError):  # status.json says already how it ended
                runtime.barrier()
        return code


def _agreed_config(config: TrainConfig, folder: RunFolder, *, world: int) -> TrainConfig:
    """The config with what the run in the folder made of `auto`.

    Raises ConfigError, also where these processes cannot share the slots of the run in the folder.
    """
    config = as_in_run_folder(config, folder)
    if problem := world_size_problem(config, world):
        raise ConfigError(f"run={folder.path}: {problem}")
    return config


def machine_facts(config: TrainConfig, runtime: Runtime) -> Facts:
    """What the machines of all ranks can do, as far as the config asks for it."""
    on_gpu, asked = has_accelerator(config.runtime), config.runtime.compile
    may_compile = asked in COMPILED or (asked == "auto" and on_gpu)
    problem = compiler_problem(runtime.device) if may_compile else None
    lpips = lpips_available("lpips", config.perceptual.weights)
    here = computes_bf16(config.runtime), lpips, problem
    has_bf16, has_lpips, problems = zip(*runtime.gather(here), strict=True)
    return Facts(
        on_gpu,
        has_bf16=all(has_bf16),
        has_lpips=all(has_lpips),
        compiler_problem=next(filter(None, problems), None),
        world=runtime.world,
    )


def _dry_run(config: TrainConfig, facts: Facts, runtime: Runtime) -> Ending:
    """Check everything, leave the run folder alone."""
    config, data = resolved_with_data(config, facts, runtime)
    runtime.on_all_ranks(lambda: _given_weights(config, data))
    return 0, dry_run(config, data, runtime)


def _given_weights(config: TrainConfig, data: Data) -> Tensors | None:
    """Those of `init_from`, which fit the model, or None without it."""
    if not config.init_from:
        return None
    with torch.device("meta"):
        model = build_vae(config, data.image_size)
    return initial_weights(config, model)


class Session:
    """The part of a session that holds the run folder, and records in status.json how it ends.

    The main process writes; another rank does where it knows the main process to be gone.
    """

    def __init__(
        self,
        config: TrainConfig,
        facts: Facts,
        runtime: Runtime,
        folder: RunFolder,
        signals: StopSignals,
    ) -> None:
        self.config, self.facts, self.runtime, self.folder = config, facts, runtime, folder
        self.trackers = Trackers()
        self.stop = StopRequest(runtime, signals)
        timeout_s = config.runtime.timeout_s
        self.watch = RankWatch(runtime, timeout_s=timeout_s, on_lost=self._on_lost)
        self.held = contextlib.ExitStack()  # given back after the last word
        self.holds_folder = False  # before, its status is that of another trainer
        self.trainer: Trainer | None = None  # once it trains
        self.ended = ""  # how, once that is recorded
        self._records = threading.Lock()

    def run(self) -> Ending:
        """Take the folder and train in it; a failure of any rank is reported by those that live."""
        with self.held, self.watch:
            try:
                self.take_folder()
                return self._train()
            except Exception as error:
                reason = self._failed(error)
        if not self.runtime.is_main:
            say(f"failed: {reason}", sys.stderr)
        return 1, [f"failed: {reason}"]

    # how it ends

    def record(
        self, status: str, reason: str, *, step: int | None = None, main_is_gone: bool = False
    ) -> None:
        """`step`: of the newest checkpoint, unless it is given. What fails after the end costs
        nothing, so the first end that is recorded stays; no thread leaves while another records."""
        folder = self.folder
        with self._records:
            if self.ended or not self.holds_folder:
                return
            self.ended = status if status != "running" else ""
            if self.runtime.is_main or (
                main_is_gone and folder.status().get("status", "running") == "running"
            ):
                step = folder.newest_step() if step is None else step
                try:
                    folder.write_status(status, step=step, reason=reason)
                except OSError as error:
                    say(f"warning: cannot write {folder.status_path}: {error}", sys.stderr)

    def _failed(self, error: Exception) -> str:
        """Save, tell the other ranks, and record why. Raises a ConfigError again."""
        if isinstance(error, TrainingFailed | RankFailed):  # of all ranks
            self._save_last(agreed=True)
            self.record("failed", str(error))
            return str(error)
        if isinstance(error, ConfigError) and self.trainer is None:  # of all ranks, too
            raise error
        here = f"rank {self.runtime.rank}: " if self.runtime.world > 1 else ""
        if not isinstance(error, ConfigError | CommandFailed):
            say(f"{here}{traceback.format_exc()}", sys.stderr)
        elif not self.runtime.is_main:  # whose own errors the command prints
            say(f"{here}{error}", sys.stderr)
        self._save_last(agreed=False)  # before the launcher learns of it, and ends all ranks
        reason, main_is_gone = self.watch.explain(error)
        self.record("failed", reason, main_is_gone=main_is_gone)
        if isinstance(error, ConfigError):
            raise error
        return reason

    def _on_lost(self, report: str, main_is_gone: bool) -> None:
        say(f"failed: {report}", sys.stderr)  # first: it may be the disk that hangs
        self._save_last(agreed=False)
        self.record("failed", report, main_is_gone=main_is_gone)

    def _save_last(self, *, agreed: bool) -> None:
        try:
            if self.trainer is not None:
                self.trainer.save_what_is_whole(agreed)
        except Exception as error:  # a device that has failed may raise anything
            say(f"warning: the last step is not saved ({error})", sys.stderr)

    # what it does

    def take_folder(self) -> None:
        """Hold the folder, which all ranks see, as long as `held` is open."""
        lock = RunLock(self.folder, say=say)

        def take() -> str:
            if not lock.attempt():
                time.sleep(LOCK_PAUSE_S)
                return ""
            self.held.callback(lock.release)
            self.held.callback(self.stop.end)
            self.held.callback(self.folder.remove_if_unused)
            self.folder.create()  # again: a starter that was refused may have removed its folders
            self.folder.remove_leftovers()
            self.folder.stop_path.unlink(missing_ok=True)  # it asked the last session to stop
            return lock.holder

        self.watch.at(-1, "run folder")
        while not (holder := self.runtime.on_main(take)):
            pass
        if self.runtime.any_rank(not self.folder.is_held_by(holder)):
            raise ConfigError(
                f"run={self.folder.path} is not the same folder on all nodes; choose one on a file "
                "system that all nodes see"
            )
        self.holds_folder = True
        if self.runtime.is_main:
            self.stop.watch_folder(self.folder, lock)

    def _train(self) -> Ending:
        self.watch.at(-1, "newest checkpoint")
        checkpoint = newest_checkpoint(self.runtime, self.folder)
        if checkpoint is not None and is_finished(self.config, checkpoint):
            self.record("finished", "all steps are done", step=checkpoint.step)
            return 0, [
                f"finished: {self.folder.path} stands at step {checkpoint.step} of "
                f"{self.config.training.steps}; nothing is left to do"
            ]
        self.watch.at(-1, "shards")
        self.config, data = resolved_with_data(self.config, self.facts, self.runtime)
        if any(map(is_remote, (*data.train.paths, *data.validation.paths))):
            self.watch.timeout_s += self.config.data.retry_s  # an outage that is sat out

        def given_weights() -> Tensors | None:
            if checkpoint is None:
                return _given_weights(self.config, data)
            check_identity(checkpoint, data.identity, self.config, self.folder)
            return None

        weights = self.runtime.on_all_ranks(given_weights)
        if self.stop.agreed_now():
            reason, step = self.stop.reason, checkpoint.step if checkpoint is not None else 0
            self.record("interrupted", reason, step=step)
            words = f"interrupted before training ({reason}); the same command starts it again"
            return EXIT_INTERRUPTED, [words]
        return self._fit(self._trainer(data, checkpoint, weights))

    def _trainer(
        self, data: Data, checkpoint: Checkpoint | None, weights: Tensors | None
    ) -> Trainer:
        """A Trainer that stands where the run does, and the plan on the console."""
        config, runtime, trackers = self.config, self.runtime, self.trackers
        start_step = checkpoint.step if checkpoint is not None else 0
        self.watch.at(-1, "trackers")
        self.held.callback(lambda: trackers.close(self.ended or "failed"))
        runtime.on_main(lambda: trackers.open(config, runtime, self.folder, start_step))
        self.watch.at(-1, "model")
        trainer = build_trainer(config, runtime, self.folder, data, trackers)
        if checkpoint is not None:
            runtime.on_all_ranks(lambda: _restore(trainer, checkpoint))
        elif weights is not None:
            runtime.on_all_ranks(lambda: trainer.initialize(weights))
        runtime.on_main(lambda: self.folder.write_config(config))
        size, vae = trainer.training_step.microbatch_size, trainer.training_step.vae
        lines = plan(config, data, runtime, vae, first_step=start_step, microbatch=size)
        if weights and any(name.startswith(DISCRIMINATOR) for name in weights):
            lines.append(f"discriminator: that of {printable(config.init_from)}")
        lines += [*runtime.hosts(), f"output {self.folder.path}", "training: the first step ..."]
        for line in lines if runtime.is_main else ():
            trainer.say(line)
        return trainer

    def _fit(self, trainer: Trainer) -> Ending:
        """Run the loop; record in status.json how it ended."""
        self.record("running", "", step=trainer.step)
        self.trainer = trainer
        stream = training_stream(self.config, self.runtime, trainer.data, trainer.step)
        with deaths_explained(LOADER_REMEDY), contextlib.closing(stream) as batches:
            status = trainer.fit(batches, self.stop, self.watch)
        reason, step = self.stop.reason, trainer.writer.written_step
        self.record(status, reason or "all steps are done", step=step)
        if status == "interrupted":
            return EXIT_INTERRUPTED, [
                f"interrupted at step {step} ({reason}); the same command goes on from there"
            ]
        run = self.folder.path
        return 0, [
            f"finished: step {step}, validation {trainer.summary()} (averaged weights)",
            f"  report    python -m vae_dist.report run={run}",
            f"  samples   python -m vae_dist.sample run={run} num_images=64 out=samples.png",
        ]


def _restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    adversarial, step = trainer.config.adversarial, checkpoint.step
    is_late = adversarial.weight > 0 and step > adversarial.start_step
    if is_late and "discriminator" not in checkpoint.tensors:
        raise ConfigError(
            f"run={trainer.folder.path}: the checkpoint of step {step} has no discriminator, and "
            f"adversarial.start_step={adversarial.start_step} lies before it; set "
            f"adversarial.start_step={step} or later"
        )
    try:
        trainer.restore(checkpoint)
    except (RuntimeError, KeyError) as error:  # torch lists each name and shape that differs
        raise ConfigError(
            f"run={trainer.folder.path}: the weights of step {step} do not fit this config's "
            "model; take back what changed under model, likelihood and data.channels, or start "
            f"anew with run=OTHER_FOLDER ({error})"
        ) from None


def build_trainer(
    config: TrainConfig, runtime: Runtime, folder: RunFolder, data: Data, trackers: Trackers
) -> Trainer:
    """Model, step and validation; at the weights of the config's seed. Every rank takes part."""
    size, largest = config.training.microbatch_size, data.largest_size
    # a trial of one rank must not wait for others
    can_try = runtime.device.type == "cuda" and runtime.strategy.forward_is_local
    if size == "auto" and not can_try:  # by the estimate, while the memory is free
        size = largest_that_fits(config, runtime, step_cost(config, largest, runtime.device))
    has_features = bool(data.settings.vision)
    step = TrainingStep(config, runtime, data.image_size, has_features=has_features)
    features = data.settings.features if has_features else ()
    step.microbatch_size = largest_that_runs(step, largest, features) if size == "auto" else size
    compile_towers(step.vae, config)

    def evaluator(model: VAE, at_step: int, must_stop: Callable[[], bool]) -> Row | None:
        images = Images(data.validation, data.evaluation_settings, config.data.retry_s)
        result = evaluate(
            model,
            images.stream(
                batch_size=config.evaluation.batch_size,
                rank=runtime.rank,
                world=runtime.world,
                workers=config.data.workers,
            ),
            seed=config.seed,
            runtime=runtime,
            max_skipped_fraction=config.data.max_skipped_fraction,
            stop_requested=must_stop,
        )
        if result is not None and runtime.is_main and model.image_size is None:
            facts = {"step": at_step, "weights": "ema", "of": "samples"}
            with trackers.warned_of(STATISTICS_FILE, at_step):
                write_statistics(folder.path / STATISTICS_FILE, result.statistics | facts)
        return result.row() if result is not None else None

    image_logger = ImageLogger(config, folder, data, trackers.sinks)
    return Trainer(step, folder, data, trackers, evaluator=evaluator, image_logger=image_logger)
