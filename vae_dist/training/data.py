"""The data of a training session: indexes of the shards, facts about them, the stream of batches.

In: the config and the runtime. Out: `Data` (indexes, made where they are missing, and how samples
become images), the config with what they make of `auto`, and this rank's batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vae_dist.config.errors import ConfigError
from vae_dist.config.resolve import Facts, has_any_size, has_buckets, images_per_slot, resolve
from vae_dist.config.schema import TrainConfig
from vae_dist.data.digits import make_digits
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import make_order
from vae_dist.data.settings import DataSet, check_data_sets, image_settings, with_features
from vae_dist.data.transforms import ImageSettings, Need
from vae_dist.distributed import Runtime
from vae_dist.models.build import stride_of
from vae_dist.models.discriminator import smallest_side as discriminator_side
from vae_dist.objectives.alignment import feature_width
from vae_dist.objectives.perceptual import smallest_side


@dataclass(frozen=True)
class Data:
    """What the shards hold. `identity` ties a run to them: it is kept in each checkpoint."""

    train: ShardIndex
    validation: ShardIndex
    settings: ImageSettings  # of training images
    any_size: bool = False  # will do for the model, so that evaluation may mix sizes

    @property
    def evaluation_settings(self) -> ImageSettings:
        settings = self.settings.without_augmentation()
        needs = tuple(need for need in settings.needs if need.in_evaluation)
        return replace(settings, any_size=self.any_size and not settings.resize, needs=needs)

    @property
    def image_size(self) -> tuple[int, int]:
        """H, W of every image that the model sees, or of a typical one where sizes differ."""
        return self.settings.size

    @property
    def largest_size(self) -> tuple[int, int]:
        """H, W of the image that costs most memory, as far as that is known before it is read."""
        return max(self.settings.buckets or (self.image_size,), key=math.prod)

    @property
    def num_dims(self) -> int:
        return math.prod(self.settings.shape)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "image_size": list(self.image_size),
            "train_data": self.train.fingerprint,
            "validation_data": self.validation.fingerprint,
        }


def resolved_with_data(
    config: TrainConfig, facts: Facts, runtime: Runtime
) -> tuple[TrainConfig, Data]:
    """What the shards hold, and the config with what they make of `auto`.

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
    data = runtime.on_all_ranks(lambda: found[0] if found else _loaded(config, create=False))
    width = 0
    if vision := config.objective.alignment:
        stored = data.settings.features[0]  # then the model need not be here
        width = stored or runtime.on_main(lambda: feature_width(vision))
    facts = replace(facts, mean_sample_bytes=data.train.mean_sample_bytes, alignment_width=width)
    return runtime.on_all_ranks(lambda: resolve(config, facts)), data


def _loaded(config: TrainConfig, *, create: bool) -> Data:
    train, validation = (
        load_index(spec, key=f"data.{key}", create=create)
        for key, spec in (("train", config.data.train), ("validation", config.data.validation))
    )
    needs = _size_needs(config)
    settings = image_settings(
        train,
        config.data,
        num_classes=config.model.num_classes,
        any_size=has_any_size(config),
        needs=needs,
    )
    if vision := config.objective.alignment:
        settings = with_features(train, settings, vision=vision)
    side = min(min(size) for size in settings.buckets or (settings.size,))
    if problems := [
        f"{need.key} needs images of {need.shorter} pixels on the shorter side, and these have "
        f"{side}; raise data.resolution, or choose another value"
        for need in needs
        if side < need.shorter
    ]:
        raise ConfigError(problems)
    return Data(train, validation, settings, any_size=config.model.latent == "spatial")


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
