"""From a run folder to a model that is ready to use, and to the images that it is shown.

In: the keys that every command on a run folder takes. Out: the VAE in eval mode with the weights of
one checkpoint, and what the run knew: config, step, image size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vae_dist.checkpoint import load_checkpoint
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import RunCommand, TrainConfig
from vae_dist.data.bundled import make_digits
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.reader import image_settings
from vae_dist.data.stream import EvaluationStream
from vae_dist.data.transforms import ImageSettings
from vae_dist.models.build import build_vae
from vae_dist.models.vae import VAE
from vae_dist.runfolder import RunFolder


class LoadedModel(NamedTuple):
    """`image_size` is the (H, W) in pixels that the model was trained on."""

    model: VAE
    config: TrainConfig
    step: int
    image_size: tuple[int, int]


def choose_device(command: RunCommand) -> torch.device:
    """The device for a command that runs in one process."""
    if command.device == "auto" and torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        return accelerator
    return torch.device("cpu")


def load_model(command: RunCommand, *, device: torch.device | None = None) -> LoadedModel:
    """The model of `command.run` in eval mode, by default on the device that `command` asks for.

    Raises ConfigError when there is no such run or checkpoint, or when they do not fit together.
    """
    folder = RunFolder(command.run)
    config = folder.config()
    checkpoint = load_checkpoint(folder.checkpoints.folder, command.checkpoint)
    if command.weights not in checkpoint.tensors:
        raise ConfigError(
            f"weights={command.weights}: checkpoint {checkpoint.step} of {command.run} holds only "
            f"{', '.join(sorted(checkpoint.tensors))}"
        )
    height, width = checkpoint.state["image_size"]
    model = build_vae(config, (height, width))
    try:
        model.load_state_dict(checkpoint.tensors[command.weights])
    except RuntimeError as error:  # torch lists every name and shape that differs
        raise ConfigError(
            f"run={command.run}: the weights of checkpoint {checkpoint.step} do not fit the model "
            f"of its config.yaml; was that file edited? {error}"
        ) from None
    model.to(device or choose_device(command)).eval()
    return LoadedModel(model, config, checkpoint.step, (height, width))


@dataclass(frozen=True)
class Images:
    """Shards, and how the run makes images of them: the two that a stream starts from."""

    index: ShardIndex
    settings: ImageSettings


def open_images(config: TrainConfig, data: Any, *, create: bool) -> Images:
    """The shards of a command's `data` key, or the run's validation shards when that is empty.

    `create` makes what can be made (the bundled digits, missing indexes): on one process only.
    Raises ConfigError for shards that are missing or damaged.
    """
    if create and not data and config.data.bundled == "digits":
        make_digits(Path(config.data.train).parent)
    spec, key = (data, "data") if data else (config.data.validation, "data.validation")
    index = load_index(spec, key=key, create=create)
    settings = image_settings(
        index,
        channels=config.data.channels,
        resolution=config.data.resolution,
        max_pixels=config.data.max_pixels,
    )
    return Images(index, settings)


def first_images(images: Images, num_images: int) -> torch.Tensor:
    """The readable ones among the first `num_images`, uint8 (N, C, H, W).

    Raises ConfigError when there is none.
    """
    return first_labelled_images(images, num_images)[0]


def first_labelled_images(images: Images, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with their labels, int64 (N,), -1 where an image has none."""
    index, settings = images.index, images.settings
    batch_size = min(num_images, index.num_samples)
    stream = EvaluationStream(index, settings, batch_size=batch_size, max_images=num_images)
    parts = [(batch.images[batch.weights > 0], batch.labels[batch.weights > 0]) for batch in stream]
    found = torch.cat([part for part, _ in parts])
    if len(found) == 0:
        raise ConfigError(
            f"none of the first {batch_size} images of {index.paths[0]} can be read; "
            "raise num_images, or mend the shard"
        )
    return found, torch.cat([labels for _, labels in parts])


def check_image_size(model: VAE, size: tuple[int, int], *, key: str) -> None:
    """Raises ConfigError, blaming `key`, when the model cannot work at this (H, W)."""
    if model.image_size is not None and size != model.image_size:
        trained = f"{model.image_size[0]}x{model.image_size[1]}"
        raise ConfigError(
            f"{key}: images of {size[0]}x{size[1]} pixels, but this model has a vector latent and "
            f"works at {trained} only; train with model.latent=spatial to use other sizes"
        )
