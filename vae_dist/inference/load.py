"""Open a run: its model ready to use, and the images that it is shown.

In: the keys that every verb on a run folder takes. Out: the VAE in eval mode with the weights of
one checkpoint, its config, step and image size; shards, and their first images as tensors. While a
run is open, float32 is float32: TensorFloat-32 is off, and as it was afterwards.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vae_dist.config.commands import EncodeCommand, EvaluateCommand, RunCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import RuntimeConfig, TrainConfig
from vae_dist.data.digits import make_digits
from vae_dist.data.evaluation import EvaluationStream
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.reader import SkippedSample
from vae_dist.data.settings import image_settings
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.workers import deaths_explained
from vae_dist.models.build import build_vae
from vae_dist.models.diffusers import fitting_keys, read_published
from vae_dist.models.vae import VAE
from vae_dist.run.checkpoint import load_checkpoint
from vae_dist.run.folder import RunFolder
from vae_dist.run.resume import initial_weights
from vae_dist.training.compile import exact_float32

if TYPE_CHECKING:
    from vae_dist.distributed import Runtime


class LoadedModel(NamedTuple):
    """`image_size` is the (H, W) in pixels that the model was trained on."""

    model: VAE
    config: TrainConfig
    step: int
    image_size: tuple[int, int]


def choose_device(name: str) -> torch.device:
    """`auto` is this process's CUDA (or ROCm) device, the CPU where there is none."""
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def open_run(command: RunCommand) -> Iterator[LoadedModel]:
    """The model of `command.run`, for a verb of one process. Raises ConfigError as `load_model`."""
    device = choose_device(command.device)
    with exact_float32(device):
        yield load_model(command, device=device)


@contextmanager
def open_run_on_ranks(
    command: EvaluateCommand | EncodeCommand, *, remedy: str
) -> Iterator[tuple[LoadedModel, Runtime]]:
    """The same for a verb that several processes share. `remedy`: what helps when a loader process
    dies. Raises ConfigError, the same on every rank."""
    from vae_dist.distributed import Runtime  # brings accelerate along

    runtime = Runtime.start(
        RuntimeConfig(device=command.device, threads=command.threads),
        precision="no",
        launcher_decides_nothing=True,
    )
    try:
        with deaths_explained(remedy), exact_float32(runtime.device):
            yield runtime.on_all_ranks(lambda: load_model(command, device=runtime.device)), runtime
    finally:
        runtime.stop()


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
    model.to(device or choose_device(command.device)).eval()
    return LoadedModel(model, config, checkpoint.step, (height, width))


def load_published(folder: Path, device: torch.device) -> LoadedModel | None:
    """The AutoencoderKL of a folder in diffusers' format, with a Gaussian likelihood that was not
    trained; None where there is none. Raises ConfigError."""
    config = TrainConfig(config="diffusers", init_from=str(folder))
    try:
        published = read_published(folder)
        if published is None:
            return None
        for key, value in fitting_keys(published).items():
            section, _, name = key.partition(".")
            setattr(getattr(config, section), name, value)
        side = int(published.config.get("sample_size") or 256)
        model = build_vae(config, (side, side))
        model.load_state_dict(initial_weights(config, model))
    except ConfigError as error:
        raise ConfigError([p.removeprefix("init_from=") for p in error.problems]) from None
    return LoadedModel(model.to(device).eval(), config, 0, (side, side))


def weights_digest(model: VAE) -> str:
    """Of the weights: a step number alone may come again with others."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Images:
    """Shards, and how the run makes images of them: the two that a stream starts from."""

    index: ShardIndex
    settings: ImageSettings


def open_images(config: TrainConfig, data: Any, *, create: bool, key: str = "data") -> Images:
    """The shards of a command's `data` key, or the run's validation shards when that is empty.

    `create` makes what can be made (the bundled digits, missing indexes): on one process only.
    Raises ConfigError for shards that are missing or damaged.
    """
    if create and not data and config.data.bundled == "digits":
        make_digits(Path(config.data.train).parent)
    spec, key = (data, key) if data else (config.data.validation, "data.validation")
    index = load_index(spec, key=key, create=create, pipes=key == "data")
    settings = image_settings(
        index,
        channels=config.data.channels,
        resolution=config.data.resolution,
        max_pixels=config.data.max_pixels,
        bits=config.data.bits,
        any_size=config.model.latent == "spatial",
        mask=config.data.mask,
        mask_fraction=config.data.mask_fraction,
        label_key=config.data.label_key,
        num_classes=config.model.num_classes,
    )
    return Images(index, settings)


def images_to_show(loaded: LoadedModel, data: Any, *, runtime: Runtime | None = None) -> Images:
    """`open_images` of shards whose images the model takes; with `runtime`, for every rank alike.
    Raises ConfigError."""
    if runtime is None:
        images = open_images(loaded.config, data, create=True)
    else:

        def create() -> None:
            open_images(loaded.config, data, create=True)

        runtime.on_main(create)
        images = runtime.on_all_ranks(lambda: open_images(loaded.config, data, create=False))
    check_image_size(loaded.model, images.settings.size, key=f"data={images.index.paths[0]}")
    return images


class Examples(NamedTuple):
    """Images of one shape."""

    images: torch.Tensor  # (N, C, H, W) as stored
    labels: torch.Tensor  # int64 (N,), -1 where an image has none
    masks: torch.Tensor | None  # uint8 (N, 1, H, W), 1: observed; None: all pixels are
    samples: torch.Tensor  # int64 (N,), numbers in index order


def first_examples(images: Images, num_images: int) -> Examples:
    """The readable ones among the first `num_images`; where images differ in size, they are resized
    and cropped to a typical one. Raises ConfigError when there is none."""
    at_one_size = Images(images.index, images.settings.at_one_size())
    return first_examples_by_shape(at_one_size, num_images)[0]


def first_examples_by_shape(
    images: Images, num_images: int, *, names: Sequence[str] | None = None
) -> list[Examples]:
    """The readable ones among the first `num_images` at their own sizes, by shape. `names`: what
    messages call the samples of the one shard. Raises ConfigError when no image can be read."""
    batch_size = min(num_images, images.index.num_samples)
    stream = EvaluationStream(
        images.index, images.settings, batch_size=batch_size, max_images=num_images
    )
    found: list[Examples] = []
    skipped: list[SkippedSample] = []
    for batch in stream:
        skipped += batch.skipped
        counts = batch.weights > 0
        masks = None if batch.masks is None else batch.masks[counts]
        if counts.any():
            found.append(
                Examples(batch.images[counts], batch.labels[counts], masks, batch.samples[counts])
            )
    reason = ""
    if skipped:
        first = skipped[0]
        named = first if names is None else f"{names[first.index]}: {first.reason}"
        reason = f"the first: {named}"
    if not found:
        raise ConfigError(
            f"none of the first {batch_size} images of {images.index.paths[0]} can be read "
            f"({reason}); raise num_images, or repair the shard"
        )
    if skipped:
        print(f"warning: {len(skipped)} images are left out; {reason}", file=sys.stderr)
    return found


def check_image_size(model: VAE, size: tuple[int, int], *, key: str) -> None:
    """Raises ConfigError, blaming `key`, when the model cannot work at this (H, W)."""
    if model.image_size is not None and size != model.image_size:
        trained = f"{model.image_size[0]}x{model.image_size[1]}"
        raise ConfigError(
            f"{key}: images of {size[0]}x{size[1]} pixels, but this model has a vector latent and "
            f"works at {trained} only; train with model.latent=spatial to use other sizes"
        )
