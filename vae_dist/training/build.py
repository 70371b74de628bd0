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
from vae_dist.config.resolve import has_any_size, has_buckets
from vae_dist.config.schema import TrainConfig
from vae_dist.data.digits import make_digits
from vae_dist.data.evaluation import EvaluationStream
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import make_order
from vae_dist.data.settings import DataSet, check_data_sets, image_settings
from vae_dist.data.transforms import Need
from vae_dist.distributed import Runtime
from vae_dist.evaluation.run import evaluate
from vae_dist.files import write_durably
from vae_dist.models.build import build_vae, stride_of
from vae_dist.models.discriminator import build_discriminator
from vae_dist.models.discriminator import smallest_side as discriminator_side
from vae_dist.models.latent import STATISTICS_FILE, write_statistics
from vae_dist.models.vae import VAE
from vae_dist.objectives.perceptual import (
    build_perceptual,
    fetch_weights,
    smallest_side,
)
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.console import ConsoleSink
from vae_dist.tracking.environment import add_session, describe_environment
from vae_dist.tracking.sinks import JsonlSink, Sink
from vae_dist.tracking.tensorboard import TensorBoardSink
from vae_dist.tracking.wandb import WandbSink
from vae_dist.training.adversarial import Adversary
from vae_dist.training.compile import (
    compile_towers,
    lay_out,
    num_shapes,
    use_tensor_float_32,
)
from vae_dist.training.images import ImageLogger
from vae_dist.training.loop import Row, Trainer
from vae_dist.training.losses import ReconstructionLosses
from vae_dist.training.memory import fit_microbatch
from vae_dist.training.optimizer import Ema, build_optimizer, freeze_encoder
from vae_dist.training.plan import Data, largest_size, peak_images_per_second
from vae_dist.training.step import TrainingStep


def load_data(config: TrainConfig, runtime: Runtime) -> Data:
    """Indexes of the shards, made by the main process where they are missing.

    Raises ConfigError on every rank where one of them cannot read the shards.
    """

    def load(*, create: bool) -> Data:
        train, validation = _both_indexes(config, create=create)
        settings = image_settings(
            train,
            config.data,
            num_classes=config.model.num_classes,
            any_size=has_any_size(config),
            needs=_size_needs(config),
        )
        data = Data(train, validation, settings, any_size=config.model.latent == "spatial")
        if create:
            sets = [
                DataSet("data.train", train, settings),
                DataSet("data.validation", validation, data.evaluation_settings),
            ]
            check_data_sets(sets, max_skipped_fraction=config.data.max_skipped_fraction)
        return data

    def prepare() -> None:
        if config.data.bundled == "digits":
            make_digits(Path(config.data.train).parent)
        found.append(load(create=True))

    found: list[Data] = []  # by the main process, which need not look again
    runtime.on_main(prepare)
    return runtime.on_all_ranks(lambda: found[0] if found else load(create=False))


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
    batch_size, buckets = config.training.batch_size, has_buckets(config)
    return TrainingStream(
        data.train,
        make_order(
            data.train,
            lanes=config.data.slots if buckets else batch_size,
            window=config.data.window,
            seed=config.seed,
            slot_rows=batch_size // config.data.slots if buckets else 0,
        ),
        data.settings,
        batch_size=batch_size,
        slots=config.data.slots,
        start_step=start_step,
        stop_step=config.training.steps,
        rank=runtime.rank,
        world=runtime.world,
        workers=config.data.workers,
        pin_memory=runtime.device.type == "cuda",
        cache_bytes=config.data.cache_bytes,
        retry_s=config.data.retry_s,
    )


def _validation_stream(config: TrainConfig, runtime: Runtime, data: Data) -> EvaluationStream:
    return EvaluationStream(
        data.validation,
        data.evaluation_settings,
        batch_size=config.evaluation.batch_size,
        rank=runtime.rank,
        world=runtime.world,
        workers=config.data.workers,
        retry_s=config.data.retry_s,
    )


def check_image_sizes(config: TrainConfig, data: Data) -> None:
    """Raises ConfigError where images are too small for what compares them."""
    sizes = data.settings.buckets or (data.image_size,)
    side = min(min(size) for size in sizes)
    problems = [
        f"{need.key} needs images of {need.shorter} pixels on the shorter side, and these have "
        f"{side}; raise data.resolution, or choose another value"
        for need in _size_needs(config)
        if side < need.shorter
    ]
    if problems:
        raise ConfigError(problems)


def _size_needs(config: TrainConfig) -> tuple[Need, ...]:
    """The smallest images that the model and what compares images take."""
    model, needs = config.model, []
    if config.perceptual.kind != "none":
        key = f"perceptual.kind={config.perceptual.kind}"
        needs.append(Need(key, shorter=smallest_side(config.perceptual)))
    if config.adversarial.weight:
        layers = config.adversarial.layers
        needs.append(Need(f"adversarial.layers={layers}", shorter=discriminator_side(layers)))
    stride = stride_of(model)
    if config.objective.scale_equivariance:
        needs.append(Need("objective.scale_equivariance", shorter=2 * stride))
    if model.latent == "spatial" and model.channels[-1] == model.norm_groups:
        # GroupNorm refuses a group of one value: one channel of one image at one position
        key = f"model.norm_groups={model.norm_groups}, one channel each,"
        needs.append(Need(key, longer=stride + 1, in_evaluation=True))
    return tuple(needs)


def build_reconstruction_losses(
    config: TrainConfig, runtime: Runtime, vae: VAE
) -> ReconstructionLosses | None:
    """What compares reconstructions with images in training; None for the bound alone.

    Raises ConfigError on every rank where the weights of LPIPS are missing on one.
    """
    has_adversary = config.adversarial.weight > 0
    if config.perceptual.kind == "none" and not has_adversary:
        return None
    runtime.on_main(lambda: fetch_weights(config.perceptual))
    perceptual = runtime.on_all_ranks(lambda: build_perceptual(config.perceptual, runtime.device))
    adversary = None
    if has_adversary:
        network = build_discriminator(
            config.adversarial, image_channels=config.data.channels, seed=config.seed
        )
        adversary = Adversary(config, runtime, network=network.to(runtime.device), vae=vae)
    return ReconstructionLosses(
        config, runtime, vae=vae, perceptual=perceptual, adversary=adversary
    )


# model, sinks


def build_step(config: TrainConfig, runtime: Runtime, image_size: tuple[int, int]) -> TrainingStep:
    """Model, optimizer, average and losses on the device; not compiled yet."""
    vae = build_vae(config, image_size).to(runtime.device)
    if config.training.train_only == "decoder":
        freeze_encoder(vae)
    use_tensor_float_32(runtime.device, config.training.precision)
    lay_out(vae, config)
    replica = copy.deepcopy(vae)  # the averages begin as the weights, before these are sharded
    return TrainingStep(
        config,
        runtime,
        wrapped=runtime.strategy.wrap(vae),
        vae=vae,
        optimizer=build_optimizer(vae, config.optimizer),
        ema=Ema(vae, decay=config.training.ema_decay, replica=replica),
        losses=build_reconstruction_losses(config, runtime, vae),
    )


def build_trainer(
    config: TrainConfig,
    runtime: Runtime,
    folder: RunFolder,
    data: Data,
    sinks: list[Sink],
    console: ConsoleSink | None,
) -> Trainer:
    step = build_step(config, runtime, data.image_size)
    fit_microbatch(step, largest_size(data))
    num_buckets = len(data.settings.buckets)
    shapes = num_shapes(config, num_buckets=num_buckets, microbatch_size=step.microbatch_size)
    compile_towers(step.vae, config, num_shapes=shapes)  # after the trials, each of another shape

    def evaluator(model: nn.Module, stop_requested: Callable[[], bool]) -> Row | None:
        assert isinstance(model, VAE)
        stream = _validation_stream(config, runtime, data)
        result = evaluate(
            model, stream, seed=config.seed, runtime=runtime, stop_requested=stop_requested
        )
        if result is None:
            return None
        if runtime.is_main and model.image_size is None:
            facts = {"step": trainer.step, "weights": "ema", "of": "samples"}
            try:
                write_statistics(folder.path / STATISTICS_FILE, result.statistics, facts)
            except OSError as error:
                trainer.say(f"warning: no {STATISTICS_FILE} ({error}); training goes on")
        return result.row()

    trainer = Trainer(
        config,
        runtime,
        folder,
        training_step=step,
        num_samples=data.train.num_samples,
        sinks=sinks,
        console=console,
        evaluator=evaluator,
        image_logger=ImageLogger(
            config, folder, data, sinks, say=console.say if console is not None else print
        ),
        identity=data.identity,
        peak_images_per_second=peak_images_per_second(config, data, runtime),
    )
    return trainer


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
        sinks.append(wandb)
        if config.log.tensorboard:
            sinks.append(TensorBoardSink(folder.path / "tensorboard", resume_step=start_step))

    runtime.on_main(open_all)
    return sinks, next((sink for sink in sinks if isinstance(sink, ConsoleSink)), None)
