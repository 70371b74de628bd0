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
from collections.abc import Iterable, Iterator
from dataclasses import replace

import psutil
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.config.resolve import COMPILED, Facts, resolve, world_size_problem
from vae_dist.config.schema import TrainConfig
from vae_dist.data.workers import deaths_explained
from vae_dist.distributed import RankFailed, Runtime, computes_bf16, has_accelerator
from vae_dist.models.build import build_vae
from vae_dist.models.networks import lpips_available
from vae_dist.objectives.perceptual import folder_of
from vae_dist.run.checkpoint import Checkpoint, Tensors
from vae_dist.run.folder import RunFolder, RunLock
from vae_dist.run.resume import (
    as_in_run_folder,
    check_identity,
    initial_weights,
    is_finished,
    newest_checkpoint,
)
from vae_dist.tracking.console import say
from vae_dist.tracking.sinks import Sink
from vae_dist.training.build import (
    build_trainer,
    check_image_sizes,
    load_data,
    open_sinks,
    training_stream,
)
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

LOCK_PAUSE_S = 0.5  # between two looks at a lock whose holder may be ending


class Startup:
    """Where the time to the first step goes, from the start of the process: `mark(what)` at the end
    of each part; `line()` says them all."""

    def __init__(self) -> None:
        self._begun = self._last = psutil.Process(os.getpid()).create_time()
        self._parts: list[tuple[str, float]] = []

    def mark(self, what: str) -> None:
        now = time.time()
        self._parts.append((what, now - self._last))
        self._last = now

    def line(self) -> str:
        parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in self._parts)
        return f"first step after {self._last - self._begun:.1f} s: {parts}"


def run_session(config: TrainConfig, signals: StopSignals) -> int:
    """Train, or go on, or say that nothing is left to do. Returns the exit code."""
    startup = Startup()
    startup.mark("imports")
    with contextlib.suppress(OSError):  # a notebook's stderr may be no file
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # kill -USR2: where does it hang?
    folder = RunFolder(config.run)
    try:
        signals.exits_at_once = True
        runtime = Runtime.join(config.runtime)
        signals.exits_at_once = False
    except RankFailed as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    startup.mark("ranks")
    try:
        config = runtime.on_all_ranks(lambda: _agreed_config(config, folder, world=runtime.world))
        facts = machine_facts(config, runtime)
        config = runtime.on_all_ranks(lambda: resolve(config, facts))
        runtime.on_all_ranks(lambda: runtime.use_precision(config.training.precision))
        if config.dry_run:
            return _dry_run(config, facts, runtime)
        code = _supervised(config, facts, runtime, folder, signals, startup)
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
    of_ranks = runtime.gather(
        (
            computes_bf16(config.runtime),
            lpips_available("vgg", folder_of(config.perceptual)),
            compiler_problem(runtime.device) if may_compile else None,
        )
    )
    bf16, lpips, problems = zip(*of_ranks, strict=True)
    problem = next((problem for problem in problems if problem is not None), None)
    return Facts(
        on_gpu,
        has_bf16=all(bf16),
        has_lpips=all(lpips),
        compiler_problem=problem,
        world=runtime.world,
    )


def _supervised(
    config: TrainConfig,
    facts: Facts,
    runtime: Runtime,
    folder: RunFolder,
    signals: StopSignals,
    startup: Startup,
) -> int:
    """Take the folder and train in it; a failure of any rank is reported by those that live."""
    outcome = Outcome(runtime, folder, timeout_s=config.runtime.timeout_s)
    stop = StopRequest(runtime, signals)
    with contextlib.ExitStack() as held:  # the folder is given back after the last word
        try:
            with outcome.watch, outcome.failures_reported():
                if not held.enter_context(_locked(outcome, stop)):
                    return _stopped_before_training(outcome, 0, stop)
                return _train(config, facts, stop, startup, outcome, held)
        except (TrainingFailed, RankFailed) as failure:
            say(f"failed: {failure}", sys.stdout if runtime.is_main else sys.stderr)
            return 1


@contextlib.contextmanager
def _locked(outcome: Outcome, stop: StopRequest) -> Iterator[bool]:
    """The run folder, held by the main process and visible to all ranks; False after a stop."""
    runtime, folder = outcome.runtime, outcome.folder
    lock = RunLock(folder, say=say)
    with contextlib.ExitStack() as held:

        def take() -> str:
            folder.create()
            if not lock.attempt():
                time.sleep(LOCK_PAUSE_S)
                return ""
            held.callback(lock.release)
            held.callback(stop.end)
            held.callback(folder.remove_if_unused)
            folder.create()  # again: a starter that was refused may have removed its folders
            folder.remove_leftovers()
            folder.stop_path.unlink(missing_ok=True)  # it asked the last session to stop
            return lock.holder

        outcome.watch.at(-1, "run folder")
        while not (holder := runtime.on_main(take)):
            if stop.agreed_now():
                yield False
                return
        if runtime.any_rank(not folder.is_held_by(holder)):
            raise ConfigError(
                f"run={folder.path} is not the same folder on all nodes; choose one on a file "
                "system that all nodes see"
            )
        outcome.is_ours = True
        if runtime.is_main:
            stop.watch_folder(folder, lock)
        yield True


def _train(
    config: TrainConfig,
    facts: Facts,
    stop: StopRequest,
    startup: Startup,
    outcome: Outcome,
    held: contextlib.ExitStack,
) -> int:
    runtime, folder, watch = outcome.runtime, outcome.folder, outcome.watch
    watch.at(-1, "newest checkpoint")
    checkpoint = newest_checkpoint(runtime, folder)
    startup.mark("checkpoint")
    start_step = checkpoint.step if checkpoint is not None else 0
    if checkpoint is not None and is_finished(config, checkpoint):
        outcome.record("finished", step=checkpoint.step, reason="all steps are done")
        if runtime.is_main:
            say(
                f"finished: {folder.path} stands at step {checkpoint.step} of "
                f"{config.training.steps}; nothing is left to do"
            )
        return 0
    if stop.agreed_now():
        return _stopped_before_training(outcome, start_step, stop)
    watch.at(-1, "shards")
    config, data = resolved_with_data(config, facts, runtime)

    def weights_to_begin_with() -> Tensors | None:
        if checkpoint is not None:
            check_identity(checkpoint, data.identity, config, folder)
            return None
        return _given_weights(config, data)

    weights = runtime.on_all_ranks(weights_to_begin_with)
    startup.mark("data")
    if stop.agreed_now():
        return _stopped_before_training(outcome, start_step, stop)
    watch.at(-1, "trackers")
    sinks, console = open_sinks(config, runtime, folder, start_step)
    held.callback(_close, sinks, "failed")  # where what follows fails; else they are closed then
    watch.at(-1, "model")
    trainer = build_trainer(config, runtime, folder, data, sinks, console)
    if checkpoint is not None:
        kept_steps = runtime.on_main(folder.checkpoints.steps)
        runtime.on_all_ranks(lambda: _restore(trainer, checkpoint, kept_steps))
    elif weights is not None:
        runtime.on_all_ranks(lambda: trainer.initialize(weights))
    runtime.on_main(lambda: folder.write_config(config))
    places = runtime.hosts()
    if console is not None:
        microbatch_size = trainer.training_step.microbatch_size
        lines = plan(config, data, runtime, first_step=start_step, microbatch_size=microbatch_size)
        lines += places
        for line in [*lines, f"output {folder.path}"]:
            console.say(line)
    startup.mark("model and trackers")
    return _fit(trainer, data, stop, startup, outcome)


def _given_weights(config: TrainConfig, data: Data) -> Tensors | None:
    """Those of `init_from`, which fit the model, or None without it."""
    if not config.init_from:
        return None
    with torch.device("meta"):
        model = build_vae(config, data.image_size)
    return initial_weights(config, model)


def resolved_with_data(
    config: TrainConfig, facts: Facts, runtime: Runtime
) -> tuple[TrainConfig, Data]:
    """What the shards hold, and the config with what they and the free memory make of `auto`."""
    data = load_data(config, runtime)
    facts = replace(facts, mean_sample_bytes=data.train.mean_sample_bytes)
    resolved = runtime.on_all_ranks(lambda: resolve(config, facts))
    runtime.on_all_ranks(lambda: check_image_sizes(resolved, data))
    return resolved, data


def _stopped_before_training(outcome: Outcome, step: int, stop: StopRequest) -> int:
    outcome.record("interrupted", step=step, reason=stop.reason)
    if outcome.runtime.is_main:
        say(_interrupted_before_training(stop.reason))
    return EXIT_INTERRUPTED


def _interrupted_before_training(reason: str) -> str:
    return f"interrupted before training ({reason}); the same command starts it again"


def _fit(
    trainer: Trainer, data: Data, stop: StopRequest, startup: Startup, outcome: Outcome
) -> int:
    """Run the loop; record in status.json how it ended."""
    config, runtime = trainer.config, trainer.runtime
    outcome.record("running", step=trainer.step, reason="")
    outcome.is_training, outcome.save_first = True, trainer.save_what_is_whole
    status = "failed"

    def first_step_is_done() -> None:
        startup.mark("first step")
        if runtime.is_main:
            trainer.say(startup.line())

    try:
        with (
            outcome.failures_reported(),
            deaths_explained(
                "lower data.workers or data.cache_bytes, or ask for more memory; then the same "
                "command goes on from its last checkpoint"
            ),
            contextlib.closing(training_stream(config, runtime, data, trainer.step)) as batches,
        ):
            status = trainer.fit(batches, stop, outcome.watch, first_step_is_done)
        outcome.record(
            status, step=trainer.writer.written_step, reason=stop.reason or "all steps are done"
        )
    finally:
        outcome.watch.end()  # what follows sends no message
        trainer.image_logger.close()
        _close(trainer.sinks, status)
    if runtime.is_main:
        for line in _farewell(trainer, status, stop.reason):
            say(line)
    return 0 if status == "finished" else EXIT_INTERRUPTED


def _close(sinks: Iterable[Sink], status: str) -> None:
    """What has been closed already is left alone."""
    for sink in sinks:
        with contextlib.suppress(OSError):
            sink.close(status)


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
            f"run={trainer.folder.path}: the weights of step {checkpoint.step} do not fit this "
            "config's model; take back what changed under model, likelihood and data.channels, or "
            f"start anew with run=OTHER_FOLDER ({error})"
        ) from None


# words


def _farewell(trainer: Trainer, status: str, reason: str) -> list[str]:
    run = trainer.folder.path
    if status == "interrupted":
        return [
            f"interrupted at step {trainer.writer.written_step} ({reason}); "
            "the same command goes on from there"
        ]
    return [
        f"finished: step {trainer.step}, validation {trainer.summary()} (averaged weights)",
        f"  images    {trainer.folder.images}",
        f"  report    python -m vae_dist.report run={run}",
        f"  next      python -m vae_dist.sample run={run} num_images=64 out=samples.png",
        f"            python -m vae_dist.reconstruct run={run}",
        f"            python -m vae_dist.evaluate run={run}",
    ]


def _dry_run(config: TrainConfig, facts: Facts, runtime: Runtime) -> int:
    """Check everything, print the plan, leave the run folder alone."""
    config, data = resolved_with_data(config, facts, runtime)
    runtime.on_all_ranks(lambda: _given_weights(config, data))
    lines = dry_run(config, data, runtime)
    if runtime.is_main:
        print("\n".join(lines))
    return 0
