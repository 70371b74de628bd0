"""What a training session is put together from: the data, the sinks, the trainer.

In: the resolved config and the runtime. Out: indexes of the shards (made where they are missing),
streams of batches, the main process' sinks, and a Trainer that holds them with model and step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

from torch import nn

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.data.bundled import make_digits
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.mixing import make_order
from vae_dist.data.reader import image_settings
from vae_dist.data.stream import EvaluationStream, TrainingStream
from vae_dist.evaluation.run import evaluate
from vae_dist.files import write_durably
from vae_dist.models.build import build_vae
from vae_dist.models.vae import VAE
from vae_dist.pictures import RunPainter
from vae_dist.plan import Data, peak_images_per_second
from vae_dist.runfolder import RunFolder
from vae_dist.runtime import Runtime
from vae_dist.tracking.environment import add_session, describe_environment
from vae_dist.tracking.sinks import ConsoleSink, JsonlSink, Sink, WandbSink
from vae_dist.tracking.tensorboard_sink import TensorBoardSink
from vae_dist.training.ema import Ema
from vae_dist.training.hooks import Row
from vae_dist.training.loop import Trainer
from vae_dist.training.optimizer import build_optimizer
from vae_dist.training.step import TrainingStep


def load_data(config: TrainConfig, runtime: Runtime) -> Data:
    """Indexes of the shards, made by the main process where they are missing."""

    def load(*, create: bool) -> Data:
        train, validation = _both_indexes(config, create=create)
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


def _both_indexes(config: TrainConfig, *, create: bool) -> tuple[ShardIndex, ShardIndex]:
    """Of training and validation; what is wrong with either is said of both."""
    indexes: list[ShardIndex] = []
    problems: list[str] = []
    for key, spec in (
        ("data.train", config.data.train),
        ("data.validation", config.data.validation),
    ):
        try:
            indexes.append(load_index(spec, key=key, create=create))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return indexes[0], indexes[1]


def training_stream(
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


def build_trainer(
    config: TrainConfig,
    runtime: Runtime,
    folder: RunFolder,
    data: Data,
    sinks: list[Sink],
    console: ConsoleSink | None,
) -> Trainer:
    vae = build_vae(config, data.image_size).to(runtime.device)
    replica = copy.deepcopy(vae)  # the averages begin as the weights, before these are cut
    wrapped = runtime.prepare(vae)
    ema = Ema(vae, decay=config.training.ema_decay, replica=replica)
    training_step = TrainingStep(
        config,
        runtime,
        wrapped=wrapped,
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
        painter=RunPainter(
            config, folder, data, sinks, say=console.say if console is not None else print
        ),
        identity=data.identity,
        peak_images_per_second=peak_images_per_second(config, data, runtime),
    )


def open_sinks(
    config: TrainConfig, runtime: Runtime, folder: RunFolder, start_step: int
) -> tuple[list[Sink], ConsoleSink | None]:
    """The main process' sinks; a problem with W&B is everybody's before training."""
    sinks: list[Sink] = []

    def open_all() -> None:
        console = ConsoleSink(start_step=start_step, stop_step=config.training.steps)
        sinks.extend([console, JsonlSink(folder.log_path, resume_step=start_step)])
        session = describe_environment(
            first_step=start_step, world=runtime.world, device=runtime.device
        )
        add_session(folder.path / "environment.json", session)
        wandb = WandbSink(
            config,
            folder.path,
            resume_step=start_step,
            say=console.say,
            on_stop=lambda: write_durably(folder.stop_path, b"the stop button of W&B"),
            environment=session,
        )
        if start_step > 0:
            wandb.backfill(folder.log_path, folder.images, up_to=start_step)
        sinks.append(wandb)
        if config.log.tensorboard:
            sinks.append(TensorBoardSink(folder.path / "tensorboard", resume_step=start_step))

    runtime.on_main(open_all)
    return sinks, next((sink for sink in sinks if isinstance(sink, ConsoleSink)), None)
