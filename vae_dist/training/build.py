"""What a training session is put together from: the data, and the trainer.

In: the resolved config and the runtime. Out: indexes of the shards (made where they are missing),
the stream of batches, and a Trainer that holds model, step and validation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vae_dist.config.errors import ConfigError
from vae_dist.config.resolve import has_any_size, has_buckets, images_per_slot
from vae_dist.config.schema import TrainConfig
from vae_dist.data.digits import make_digits
from vae_dist.data.evaluation import EvaluationStream
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import make_order
from vae_dist.data.settings import DataSet, check_data_sets, image_settings, with_features
from vae_dist.data.transforms import Need
from vae_dist.distributed import Runtime
from vae_dist.evaluation.run import evaluate
from vae_dist.models.build import stride_of
from vae_dist.models.discriminator import smallest_side as discriminator_side
from vae_dist.models.latent import STATISTICS_FILE, write_statistics
from vae_dist.models.vae import VAE
from vae_dist.objectives.perceptual import smallest_side
from vae_dist.run.folder import RunFolder
from vae_dist.training.compile import compile_towers
from vae_dist.training.images import ImageLogger
from vae_dist.training.loop import Row, Trainer
from vae_dist.training.memory import fit_microbatch
from vae_dist.training.plan import Data
from vae_dist.training.step import TrainingStep
from vae_dist.training.trackers import Trackers


def load_data(config: TrainConfig, runtime: Runtime) -> Data:
    """Indexes of the shards, made by the main process where they are missing.

    Raises ConfigError on every rank where one of them cannot read the shards, or where they are not
    what the config says.
    """
    found: list[Data] = []  # by the main process, which need not look again

    def prepare() -> None:
        if config.data.bundled == "digits":
            make_digits(Path(config.data.train).parent)
        data = _loaded(config, create=True)
        sets = [
            DataSet("data.train", data.train, data.settings),
            DataSet("data.validation", data.validation, data.evaluation_settings),
        ]
        check_data_sets(sets, max_skipped_fraction=config.data.max_skipped_fraction)
        found.append(data)

    runtime.on_main(prepare)
    return runtime.on_all_ranks(lambda: found[0] if found else _loaded(config, create=False))


def _loaded(config: TrainConfig, *, create: bool) -> Data:
    """What is wrong with either of the two indexes is said of both."""
    indexes: list[ShardIndex] = []
    problems: list[str] = []
    for key in ("train", "validation"):
        try:
            spec = getattr(config.data, key)
            indexes.append(load_index(spec, key=f"data.{key}", create=create))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    train, validation = indexes
    settings = image_settings(
        train,
        config.data,
        num_classes=config.model.num_classes,
        any_size=has_any_size(config),
        needs=_size_needs(config),
    )
    if vision := config.objective.alignment:
        settings = with_features(train, settings, vision=vision, key="data.train")
    return Data(train, validation, settings, any_size=config.model.latent == "spatial")


def check_image_sizes(config: TrainConfig, data: Data) -> None:
    """Raises ConfigError where images are too small for what compares them."""
    side = min(min(size) for size in data.settings.buckets or (data.image_size,))
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


def training_stream(
    config: TrainConfig, runtime: Runtime, data: Data, start_step: int
) -> TrainingStream:
    """The batches of this rank from `start_step` on."""
    buckets = has_buckets(config)
    order = make_order(
        data.train,
        lanes=config.data.slots if buckets else config.training.batch_size,
        window=config.data.window,
        seed=config.seed,
        slot_rows=images_per_slot(config) if buckets else 0,
    )
    return TrainingStream(
        data.train,
        order,
        data.settings,
        batch_size=config.training.batch_size,
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


def build_trainer(
    config: TrainConfig, runtime: Runtime, folder: RunFolder, data: Data, trackers: Trackers
) -> Trainer:
    """Model, step and validation; at the weights of the config's seed. Every rank takes part."""
    stored = data.settings.features if data.settings.vision else ()
    step = TrainingStep(config, runtime, data.image_size, features=stored)
    fit_microbatch(step, data.largest_size)
    # sizes by numbers of images of a microbatch (its last one may be smaller), twice at half size,
    # twice where the decoder is watched for a discriminator
    together = max(1, step.microbatch_size // images_per_slot(config))
    max_shapes = 4 * max(2, len(data.settings.buckets) * together)
    compile_towers(step.vae, config, max_shapes=max_shapes)  # after trials of other shapes

    def evaluator(model: VAE, at_step: int, must_stop: Callable[[], bool]) -> Row | None:
        batches = EvaluationStream(
            data.validation,
            data.evaluation_settings,
            batch_size=config.evaluation.batch_size,
            rank=runtime.rank,
            world=runtime.world,
            workers=config.data.workers,
            retry_s=config.data.retry_s,
        )
        result = evaluate(
            model,
            batches,
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

    image_logger = ImageLogger(config, folder, data, trackers.sinks, say=trackers.say)
    return Trainer(step, folder, data, trackers, evaluator=evaluator, image_logger=image_logger)
