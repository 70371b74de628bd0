"""A training session: from a config to a Trainer in its run folder, and to an exit code.

The order is: join the ranks; agree with the run that is in the folder; take the folder; choose the
newest checkpoint; index the data; build model, step and sinks; restore; train. Whatever can be
refused is refused before the model is built, by all ranks with the same words, whichever rank found
it. Only the main process writes, as long as it lives.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
from dataclasses import replace

import psutil
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.config.resolve import COMPILED, Facts, resolve, world_size_problem
from vae_dist.config.schema import TrainConfig
from vae_dist.data.sources import is_remote
from vae_dist.data.workers import deaths_explained
from vae_dist.distributed import RankFailed, Runtime, computes_bf16, has_accelerator
from vae_dist.files import printable
from vae_dist.models.build import build_vae
from vae_dist.models.networks import lpips_available
from vae_dist.objectives.alignment import feature_width
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
from vae_dist.training.build import build_trainer, check_image_sizes, load_data, training_stream
from vae_dist.training.compile import compiler_problem
from vae_dist.training.loop import Trainer
from vae_dist.training.plan import Data, dry_run, plan
from vae_dist.training.stop import (
    EXIT_INTERRUPTED,
    Outcome,
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
    folder = RunFolder(config.run)
    try:
        signals.exits_at_once = True
        runtime = Runtime.join(config.runtime)
        signals.exits_at_once = False
    except RankFailed as failure:
        say(f"failed: {failure}", sys.stderr)
        return 1
    try:
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
    finally:
        runtime.stop()


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
    bf16, lpips, problems = zip(
        *runtime.gather(
            (
                computes_bf16(config.runtime),
                lpips_available("vgg", config.perceptual.weights),
                compiler_problem(runtime.device) if may_compile else None,
            )
        ),
        strict=True,
    )
    problem = next(filter(None, problems), None)
    return Facts(
        on_gpu,
        has_bf16=all(bf16),
        has_lpips=all(lpips),
        compiler_problem=problem,
        world=runtime.world,
    )


def resolved_with_data(
    config: TrainConfig, facts: Facts, runtime: Runtime
) -> tuple[TrainConfig, Data]:
    """What the shards hold, and the config with what they and the free memory make of `auto`."""
    data = load_data(config, runtime)
    width = 0
    if vision := config.objective.alignment:
        stored = data.settings.features[0]  # then the model need not be here
        width = stored or runtime.on_main(lambda: feature_width(vision))
    facts = replace(facts, mean_sample_bytes=data.train.mean_sample_bytes, alignment_width=width)
    resolved = runtime.on_all_ranks(lambda: resolve(config, facts))
    runtime.on_all_ranks(lambda: check_image_sizes(resolved, data))
    return resolved, data


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
    """The part of a session that holds the run folder."""

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
        self.outcome = Outcome(runtime, folder, timeout_s=config.runtime.timeout_s)
        self.watch = self.outcome.watch
        self.held = contextlib.ExitStack()  # given back after the last word

    def run(self) -> Ending:
        """Take the folder and train in it; a failure of any rank is reported by those that live."""
        try:
            with self.held, self.watch, self.outcome.failures_reported():
                if self.take_folder():
                    return self._train()
                return self._stopped_before_training(0)
        except (TrainingFailed, RankFailed) as failure:
            if not self.runtime.is_main:
                say(f"failed: {failure}", sys.stderr)
            return 1, [f"failed: {failure}"]

    def take_folder(self) -> bool:
        """Hold the folder, which all ranks see, as long as `held` is open; False after a stop."""
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
            if self.stop.agreed_now():
                return False
        if self.runtime.any_rank(not self.folder.is_held_by(holder)):
            raise ConfigError(
                f"run={self.folder.path} is not the same folder on all nodes; choose one on a file "
                "system that all nodes see"
            )
        self.outcome.is_ours = True
        if self.runtime.is_main:
            self.stop.watch_folder(self.folder, holder)
        return True

    def _stopped_before_training(self, step: int) -> Ending:
        reason = self.stop.reason
        self.outcome.record("interrupted", reason, step=step)
        return EXIT_INTERRUPTED, [
            f"interrupted before training ({reason}); the same command starts it again"
        ]

    def _train(self) -> Ending:
        self.watch.at(-1, "newest checkpoint")
        checkpoint = newest_checkpoint(self.runtime, self.folder)
        step = checkpoint.step if checkpoint is not None else 0
        if checkpoint is not None and is_finished(self.config, checkpoint):
            self.outcome.record("finished", "all steps are done", step=step)
            return 0, [
                f"finished: {self.folder.path} stands at step {step} of "
                f"{self.config.training.steps}; nothing is left to do"
            ]
        if self.stop.agreed_now():
            return self._stopped_before_training(step)
        self.watch.at(-1, "shards")
        self.config, data = resolved_with_data(self.config, self.facts, self.runtime)
        if any(map(is_remote, (*data.train.paths, *data.validation.paths))):
            self.watch.reading_s = self.config.data.retry_s
        weights = self.runtime.on_all_ranks(lambda: self._weights_to_begin_with(data, checkpoint))
        if self.stop.agreed_now():
            return self._stopped_before_training(step)
        trainer = self._trainer(data, checkpoint, weights)
        return self._fit(trainer)

    def _weights_to_begin_with(self, data: Data, checkpoint: Checkpoint | None) -> Tensors | None:
        if checkpoint is None:
            return _given_weights(self.config, data)
        check_identity(checkpoint, data.identity, self.config, self.folder)
        return None

    def _trainer(
        self, data: Data, checkpoint: Checkpoint | None, weights: Tensors | None
    ) -> Trainer:
        """A Trainer that stands where the run does, and the plan on the console."""
        config, runtime, trackers = self.config, self.runtime, self.trackers
        start_step = checkpoint.step if checkpoint is not None else 0
        self.watch.at(-1, "trackers")
        self.held.callback(lambda: trackers.close(self.outcome.ended or "failed"))
        trackers.open(config, runtime, self.folder, start_step)
        self.watch.at(-1, "model")
        trainer = build_trainer(config, runtime, self.folder, data, trackers)
        self.held.callback(trainer.image_logger.close)
        if checkpoint is not None:
            kept_steps = runtime.on_main(self.folder.checkpoints.steps)
            runtime.on_all_ranks(lambda: _restore(trainer, checkpoint, kept_steps))
        elif weights is not None:
            runtime.on_all_ranks(lambda: trainer.initialize(weights))
        runtime.on_main(lambda: self.folder.write_config(config))
        size, vae = trainer.training_step.microbatch_size, trainer.training_step.vae
        lines = plan(config, data, runtime, vae, first_step=start_step, microbatch_size=size)
        if weights and any(name.startswith(DISCRIMINATOR) for name in weights):
            lines.append(f"discriminator: that of {printable(config.init_from)}")
        lines += [*runtime.hosts(), f"output {self.folder.path}"]
        for line in lines if runtime.is_main else ():
            trainer.say(line)
        return trainer

    def _fit(self, trainer: Trainer) -> Ending:
        """Run the loop; record in status.json how it ended."""

        def first_step_is_done() -> None:
            seconds = time.time() - psutil.Process(os.getpid()).create_time()
            if self.runtime.is_main:
                trainer.say(f"first step after {seconds:.1f} s")

        trainer.on_first_step = first_step_is_done
        self.outcome.record("running", "", step=trainer.step)
        self.outcome.save_first = trainer.save_what_is_whole
        stream = training_stream(self.config, self.runtime, trainer.data, trainer.step)
        with deaths_explained(LOADER_REMEDY), contextlib.closing(stream) as batches:
            status = trainer.fit(batches, self.stop, self.watch)
        reason, step = self.stop.reason, trainer.writer.written_step
        self.outcome.record(status, reason or "all steps are done", step=step)
        if status == "interrupted":
            return EXIT_INTERRUPTED, [
                f"interrupted at step {step} ({reason}); the same command goes on from there"
            ]
        run = self.folder.path
        return 0, [
            f"finished: step {step}, validation {trainer.summary()} (averaged weights)",
            f"  images    {self.folder.images}",
            f"  report    python -m vae_dist.report run={run}",
            f"  next      python -m vae_dist.sample run={run} num_images=64 out=samples.png",
            f"            python -m vae_dist.reconstruct run={run}",
            f"            python -m vae_dist.evaluate run={run}",
        ]


def _restore(trainer: Trainer, checkpoint: Checkpoint, kept_steps: list[int]) -> None:
    adversarial, step = trainer.config.adversarial, checkpoint.step
    is_late = adversarial.weight > 0 and step > adversarial.start_step
    if is_late and "discriminator" not in checkpoint.tensors:
        raise ConfigError(
            f"run={trainer.folder.path}: the checkpoint of step {step} has no discriminator, and "
            f"adversarial.start_step={adversarial.start_step} lies before it; set "
            f"adversarial.start_step={step} or later"
        )
    try:
        trainer.restore(checkpoint, kept_steps=kept_steps)
    except (RuntimeError, KeyError) as error:  # torch lists each name and shape that differs
        raise ConfigError(
            f"run={trainer.folder.path}: the weights of step {step} do not fit this config's "
            "model; take back what changed under model, likelihood and data.channels, or start "
            f"anew with run=OTHER_FOLDER ({error})"
        ) from None
