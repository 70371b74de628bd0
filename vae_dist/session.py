"""A training session: from a config to a Trainer in its run folder, and to an exit code.

The order is: join the ranks; take the run folder; agree with the run that is in it; index the
data; build model, step and sinks; restore the newest checkpoint; train. Whatever can be refused is
refused before the model is built. Only the main process writes; its errors reach all ranks.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from vae_dist.checkpoint import Checkpoint
from vae_dist.config import checks
from vae_dist.config.errors import ConfigError
from vae_dist.config.load import changed_numbers
from vae_dist.config.schema import TrainConfig
from vae_dist.data.bundled import make_digits
from vae_dist.data.index import load_index
from vae_dist.data.mixing import make_order
from vae_dist.data.reader import image_settings
from vae_dist.data.stream import EvaluationStream, TrainingStream
from vae_dist.evaluation.run import evaluate
from vae_dist.models.build import build_vae
from vae_dist.models.vae import VAE
from vae_dist.pictures import RunPainter
from vae_dist.plan import Data, costs, plan
from vae_dist.runfolder import EXIT_INTERRUPTED, RunFolder, RunLock
from vae_dist.runtime import Runtime, has_accelerator
from vae_dist.tracking.sinks import ConsoleSink, JsonlSink, Sink, WandbSink
from vae_dist.training.ema import Ema
from vae_dist.training.guard import TrainingFailed
from vae_dist.training.loop import Row, Trainer
from vae_dist.training.optimizer import build_optimizer
from vae_dist.training.preemption import StopRequest
from vae_dist.training.step import TrainingStep


def run_session(config: TrainConfig) -> int:
    """Train, or go on, or say that nothing is left to do. Returns the exit code."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # kill -USR2: where does it hang?
    folder = RunFolder(config.run)
    if not config.dry_run:
        config = _as_in_run_folder(config, folder)
    accelerated = has_accelerator(config.runtime)
    if config.training.precision == "auto":
        config.training.precision = "bf16" if accelerated else "no"
    runtime = Runtime.start(config.runtime, precision=config.training.precision)
    try:
        if config.dry_run:
            return _dry_run(config, runtime)
        with _locked(folder, runtime):
            return _train(config, runtime, folder)
    finally:
        runtime.stop()


def _as_in_run_folder(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """What the config leaves automatic is as the run in the folder resolved it.

    Raises ConfigError with the differences that would change the run's numbers.
    """
    if not folder.has_config() or not folder.checkpoints.steps():
        return config  # nothing is there that could be lost
    previous = folder.config()
    config = copy.deepcopy(config)
    config.data.slots = config.data.slots or previous.data.slots
    if config.data.window == "auto":
        config.data.window = previous.data.window
    if config.training.precision == "auto":
        config.training.precision = previous.training.precision
    changes = changed_numbers(previous, config)
    if changes and not config.resume.allow_changes:
        raise ConfigError(
            [
                f"run={folder.path}: this config would change the numbers of the run in it:",
                *(f"  {line}" for line in changes),
                "take these back, or start anew with run=OTHER_FOLDER, or go on all the same with "
                "resume.allow_changes=true",
            ]
        )
    return config


@contextlib.contextmanager
def _locked(folder: RunFolder, runtime: Runtime) -> Iterator[None]:
    """The run folder, held by the main process and visible to all ranks."""
    with contextlib.ExitStack() as held:

        def take() -> str:
            folder.create()
            held.enter_context(RunLock(folder))
            folder.checkpoints.remove_leftovers()
            folder.stop_path.unlink(missing_ok=True)  # it asked the last session to stop
            return folder.write_token()

        token = runtime.on_main(take)
        if runtime.any_rank(not folder.sees_token(token)):
            raise ConfigError(
                f"run={folder.path} is not the same folder on all nodes; choose one on a file "
                "system that all nodes see"
            )
        yield


def _train(config: TrainConfig, runtime: Runtime, folder: RunFolder) -> int:
    checkpoint = _newest_checkpoint(runtime, folder)
    if checkpoint is not None and _is_finished(config, checkpoint):
        if runtime.is_main:
            folder.write_status("finished", step=checkpoint.step, reason="all steps are done")
            print(
                f"finished: {folder.path} stands at step {checkpoint.step} of "
                f"{config.training.steps}; nothing is left to do"
            )
        return 0
    data = _load_data(config, runtime)
    config = checks.resolve(
        config,
        mean_sample_bytes=data.train.mean_sample_bytes,
        has_accelerator=has_accelerator(config.runtime),
    )
    if checkpoint is not None:
        _check_identity(checkpoint, data, config, folder)
    if runtime.is_main:
        folder.write_config(config)
    start_step = checkpoint.step if checkpoint is not None else 0
    sinks, console = _open_sinks(config, runtime, folder, start_step)
    trainer = _build_trainer(config, runtime, folder, data, sinks, console)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if console is not None:
        for line in plan(config, data, runtime, first_step=start_step):
            console.say(line)
        console.say(f"output {folder.path}")
    return _fit(trainer, data)


def _fit(trainer: Trainer, data: Data) -> int:
    """Run the loop; record in status.json how it ended."""
    config, runtime, folder = trainer.config, trainer.runtime, trainer.folder

    def record(status: str, reason: str) -> None:
        if runtime.is_main:
            folder.write_status(status, step=trainer.step, reason=reason)

    record("running", "")
    status = "failed"
    try:
        with (
            StopRequest(runtime, folder.stop_path) as stop,
            contextlib.closing(_training_stream(config, runtime, data, trainer.step)) as batches,
        ):
            status = trainer.fit(batches, stop)
        record(status, stop.reason or "all steps are done")
    except TrainingFailed as failure:
        record("failed", str(failure))
        trainer.say(f"failed: {failure}")
        return 1
    except BaseException as error:
        record("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        for sink in trainer.sinks:
            sink.close(status)
    if runtime.is_main:
        for line in _farewell(trainer, status, stop.reason):
            print(line)
    return 0 if status == "finished" else EXIT_INTERRUPTED


# the run that is in the folder


def _newest_checkpoint(runtime: Runtime, folder: RunFolder) -> Checkpoint | None:
    """The checkpoint that the main process chose, read by every rank."""
    mine = folder.checkpoints.load_newest() if runtime.is_main else None
    step = runtime.broadcast(mine.step if mine is not None else -1)
    if step < 0:
        return None
    if runtime.is_main:
        folder.checkpoints.discard_after(step)
        return mine
    return folder.checkpoints.load(step)


def _is_finished(config: TrainConfig, checkpoint: Checkpoint) -> bool:
    scalars = checkpoint.state["scalars"]
    return checkpoint.step >= config.training.steps and (
        scalars["evaluated_step"] == checkpoint.step
    )


def _check_identity(
    checkpoint: Checkpoint, data: Data, config: TrainConfig, folder: RunFolder
) -> None:
    if config.resume.allow_changes:
        return
    differences = [
        f"{key}: {checkpoint.state[key]} -> {value}"
        for key, value in data.identity.items()
        if checkpoint.state[key] != value
    ]
    if differences:
        raise ConfigError(
            [
                f"run={folder.path}: the shards of data.train are not those that the run began "
                "with, so it cannot go on exactly:",
                *(f"  {line}" for line in differences),
                "put the shards back, or start anew with run=OTHER_FOLDER, or go on all the same "
                "with resume.allow_changes=true",
            ]
        )


# data


def _load_data(config: TrainConfig, runtime: Runtime) -> Data:
    """Indexes of the shards, made by the main process where they are missing."""

    def load(*, create: bool) -> Data:
        train = load_index(config.data.train, key="data.train", create=create)
        validation = load_index(config.data.validation, key="data.validation", create=create)
        settings = image_settings(
            train,
            channels=config.data.channels,
            resolution=config.data.resolution,
            max_pixels=config.data.max_pixels,
            crop=config.data.crop,
            flip=config.data.flip,
        )
        return Data(train, validation, settings)

    def prepare() -> None:
        if config.data.bundled == "digits":
            make_digits(Path(config.data.train).parent)
        load(create=True)

    runtime.on_main(prepare)
    return load(create=False)


def _training_stream(
    config: TrainConfig, runtime: Runtime, data: Data, start_step: int
) -> TrainingStream:
    batch_size = config.training.batch_size
    return TrainingStream(
        data.train,
        make_order(data.train, lanes=batch_size, window=config.data.window, seed=config.seed),
        data.settings,
        batch_size=batch_size,
        start_step=start_step,
        stop_step=config.training.steps,
        rank=runtime.rank,
        world=runtime.world,
        workers=config.data.workers,
        pin_memory=runtime.device.type == "cuda",
    )


def _validation_stream(config: TrainConfig, runtime: Runtime, data: Data) -> EvaluationStream:
    return EvaluationStream(
        data.validation,
        data.settings.without_augmentation(),
        batch_size=config.evaluation.batch_size,
        rank=runtime.rank,
        world=runtime.world,
    )


# model, sinks


def _build_trainer(
    config: TrainConfig,
    runtime: Runtime,
    folder: RunFolder,
    data: Data,
    sinks: list[Sink],
    console: ConsoleSink | None,
) -> Trainer:
    vae = build_vae(config, data.image_size).to(runtime.device)
    ema = Ema(vae, decay=config.training.ema_decay)
    training_step = TrainingStep(
        config,
        runtime,
        wrapped=runtime.prepare(vae),
        vae=vae,
        optimizer=build_optimizer(vae, config.optimizer),
        ema=ema,
    )

    def evaluator(model: nn.Module, stop_requested: Callable[[], bool]) -> Row | None:
        assert isinstance(model, VAE)
        stream = _validation_stream(config, runtime, data)
        result = evaluate(
            model, stream, seed=config.seed, runtime=runtime, stop_requested=stop_requested
        )
        return None if result is None else result.row()

    return Trainer(
        config,
        runtime,
        folder,
        training_step=training_step,
        num_samples=data.train.num_samples,
        num_dims=data.num_dims,
        sinks=sinks,
        console=console,
        evaluator=evaluator,
        painter=RunPainter(config, folder, data, sinks),
        identity=data.identity,
    )


def _open_sinks(
    config: TrainConfig, runtime: Runtime, folder: RunFolder, start_step: int
) -> tuple[list[Sink], ConsoleSink | None]:
    """The main process' sinks; a problem with W&B is everybody's before training."""
    sinks: list[Sink] = []

    def open_all() -> None:
        console = ConsoleSink(start_step=start_step, stop_step=config.training.steps)
        sinks.extend([console, JsonlSink(folder.log_path, resume_step=start_step)])
        wandb = WandbSink(config, folder.path, resume_step=start_step, say=console.say)
        sinks.append(wandb)

    runtime.on_main(open_all)
    return sinks, next((sink for sink in sinks if isinstance(sink, ConsoleSink)), None)


# words


def _farewell(trainer: Trainer, status: str, reason: str) -> list[str]:
    run = trainer.folder.path
    if status == "interrupted":
        return [
            f"interrupted at step {trainer.step} ({reason}); the same command goes on from there"
        ]
    return [
        f"finished: step {trainer.step}, validation {trainer.summary()} (averaged weights)",
        f"  pictures  {trainer.folder.images}",
        f"  next      python -m vae_dist.sample run={run} num_images=64 out=samples.png",
        f"            python -m vae_dist.reconstruct run={run}",
        f"            python -m vae_dist.evaluate run={run}",
    ]


def _dry_run(config: TrainConfig, runtime: Runtime) -> int:
    """Check everything, print the plan, leave the run folder alone."""
    data = _load_data(config, runtime)
    config = checks.resolve(
        config,
        mean_sample_bytes=data.train.mean_sample_bytes,
        has_accelerator=has_accelerator(config.runtime),
    )
    if runtime.is_main:
        print(
            "\n".join([*plan(config, data, runtime, first_step=0), *costs(config, data, runtime)])
        )
    return 0
