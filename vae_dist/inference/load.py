"""Open a run: its model ready to use, and the images that it is shown.

In: the keys that every verb on a run folder takes. Out: the VAE in eval mode with the weights of
one checkpoint, its config, step and image size; shards, and their first images as tensors.

A run folder may come from anybody. Its weights are held against the model of its config on the meta
device, before anything is allocated. The shards that its config names are read, never written to,
and only as local paths or over http(s).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vae_dist.config.commands import CheckpointCommand, EncodeCommand, EvaluateCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import RuntimeConfig, TrainConfig
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.loader import EvaluationBatch, EvaluationStream
from vae_dist.data.reader import SampleReader, SkippedSample
from vae_dist.data.settings import image_settings
from vae_dist.data.sources import HTTP, START_RETRY_S, is_remote
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.workers import deaths_explained
from vae_dist.files import printable
from vae_dist.models.build import blocks_of_levels, build_vae
from vae_dist.models.diffusers import fitting_keys, read_published
from vae_dist.models.vae import VAE
from vae_dist.run.checkpoint import load_checkpoint
from vae_dist.run.folder import RunFolder
from vae_dist.run.resume import initial_weights
from vae_dist.training.compile import exact_float32

if TYPE_CHECKING:
    from vae_dist.distributed import Runtime

Size = tuple[int, int]  # (H, W) in pixels
MAX_BLOCKS = 2**10  # residual blocks: a forged config may ask for any number
# what building a model of a forged config raises
FORGED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class LoadedModel(NamedTuple):
    """`image_size` is the (H, W) in pixels that the model was trained on."""

    model: VAE
    config: TrainConfig
    step: int
    image_size: Size


def choose_device(name: str) -> torch.device:
    """`auto` is this process's CUDA (or ROCm) device, the CPU where there is none."""
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def open_run(command: CheckpointCommand, *, device: str = "auto") -> Iterator[LoadedModel]:
    """The model of `command.run`, for a verb of one process; TensorFloat-32 is off meanwhile.
    Raises ConfigError as `load_model`."""
    chosen = choose_device(device)
    with exact_float32():
        yield load_model(command, device=chosen)


@contextmanager
def open_ranks(command: EvaluateCommand | EncodeCommand) -> Iterator[Runtime]:
    """The ranks of a verb that several processes share; TensorFloat-32 is off meanwhile."""
    from vae_dist.distributed import Runtime  # brings accelerate along

    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # of a launcher: it is one of training
    config = RuntimeConfig(device=command.device, threads=command.threads)
    runtime = Runtime.start(config, precision="no")
    try:
        with deaths_explained("ask for more memory"), exact_float32():
            yield runtime
    finally:
        runtime.stop()


@contextmanager
def open_run_on_ranks(
    command: EvaluateCommand | EncodeCommand,
) -> Iterator[tuple[LoadedModel, Runtime]]:
    """`open_run` for such a verb. Raises ConfigError, the same on every rank."""
    with open_ranks(command) as runtime:
        yield runtime.on_all_ranks(lambda: load_model(command, device=runtime.device)), runtime


def load_model(command: CheckpointCommand, *, device: torch.device | None = None) -> LoadedModel:
    """The model of `command.run` in eval mode, by default on the CPU.

    Raises ConfigError when there is no such run or checkpoint, or when they do not fit together.
    """
    folder = RunFolder(command.run)
    config = folder.config()
    checkpoint = load_checkpoint(folder.checkpoints.folder, command.checkpoint)
    try:
        height, width = map(int, checkpoint.state["image_size"])
        weights = checkpoint.tensors[command.weights]
        model = _built(config, (height, width), lambda model: weights)
    except FORGED as error:  # torch lists every name and shape that differs
        raise ConfigError(
            f"run={command.run}: the weights of checkpoint {checkpoint.step} do not fit the model "
            f"of its config.yaml ({error})"
        ) from None
    model.to(device or torch.device("cpu"))
    config.data.workers = min(config.data.workers, len(os.sched_getaffinity(0)))
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
        model = _built(config, (side, side), lambda model: initial_weights(config, model))
    except ConfigError as error:
        raise ConfigError([p.removeprefix("init_from=") for p in error.problems]) from None
    except FORGED as error:
        raise ConfigError(f"{folder}: its config.json describes no model ({error})") from None
    return LoadedModel(model.to(device), config, 0, (side, side))


def _built(
    config: TrainConfig, image_size: Size, weights_for: Callable[[VAE], Mapping[str, Tensor]]
) -> VAE:
    """In eval mode on the CPU, with copies of the weights for its shapes. Raises one of FORGED."""
    if sum(blocks_of_levels(config.model)) > MAX_BLOCKS:
        raise ValueError(f"model.blocks={config.model.blocks}")
    with torch.device("meta"):
        model = build_vae(config, image_size)
    weights = weights_for(model)
    copies = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()


def weights_digest(model: nn.Module) -> str:
    """Of the weights: a step number alone may come again with others."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Images:
    """Shards, and how the run makes images of them."""

    index: ShardIndex
    settings: ImageSettings
    retry_s: float = START_RETRY_S  # that a remote read is tried again, seconds

    def stream(self, **options: Any) -> EvaluationStream:
        """All of them in index order; options as of `EvaluationStream`."""
        return EvaluationStream(self.index, self.settings, retry_s=self.retry_s, **options)

    def reader(self) -> SampleReader:
        """One sample at a time, without augmentation."""
        settings = self.settings.without_augmentation()
        return SampleReader(self.index, settings, seed=0, retry_s=self.retry_s)

    def at_one_size(self, size: Size | None = None) -> Images:
        """Resized and cropped to (H, W), by default to a typical size."""
        return replace(self, settings=self.settings.at_one_size(size))


def open_images(config: TrainConfig, data: Any, *, create: bool, key: str = "data") -> Images:
    """The shards of a command's `data` key, or the run's validation shards when that is empty.

    `create` makes missing indexes of the former: on one process only. Raises ConfigError for
    shards that are missing or damaged, and where the config names any but local paths and http(s).
    """
    is_own = not data or key != "data"
    if is_own:
        data, key = (data, key) if data else (config.data.validation, "data.validation")
        check_own_shards(data, key=key)
    index = load_index(data, key=key, create=create and not is_own)
    settings = image_settings(
        index,
        config.data,
        num_classes=config.model.num_classes,
        any_size=config.model.latent == "spatial",
    )
    return Images(index, settings, config.data.retry_s)


def check_own_shards(spec: Any, *, key: str) -> None:
    """Raises ConfigError where the shards of a run folder's config are more than local paths or
    http(s): another scheme may run a program or use this user's credentials."""
    if isinstance(spec, Mapping | list | tuple):
        for part in spec.values() if isinstance(spec, Mapping) else spec:
            check_own_shards(part, key=key)
        return
    place = str(spec)
    if is_remote(place) and not (place.startswith(HTTP) and place.count("://") == 1):
        raise ConfigError(
            f"{key}={place}: of a run folder's config.yaml only local paths and http(s) are read; "
            f"give data='{place}' on the command line if you trust it"
        )


def images_to_show(loaded: LoadedModel, data: Any, *, runtime: Runtime | None = None) -> Images:
    """`open_images` of shards whose images the model takes; with `runtime`, for every rank alike.
    Raises ConfigError."""
    if runtime is None:
        images = open_images(loaded.config, data, create=True)
    else:
        runtime.on_main(lambda: open_images(loaded.config, data, create=True))
        images = runtime.on_all_ranks(lambda: open_images(loaded.config, data, create=False))
    check_image_size(loaded.model, images.settings.size, key=f"data={images.index.paths[0]}")
    return images


def first_examples_by_shape(
    images: Images, num_images: int, *, names: Sequence[str] | None = None
) -> list[EvaluationBatch]:
    """The readable ones among the first `num_images` at their own sizes, by shape. `names`: what
    messages call the samples of the one shard. Raises ConfigError when no image can be read."""
    batch_size = min(num_images, images.index.num_samples)
    found, skipped = list[EvaluationBatch](), list[SkippedSample]()
    for batch in images.stream(batch_size=batch_size, max_images=num_images):
        skipped += batch.skipped
        if batch.weights.any():
            found.append(batch.counted())
    first = "; ".join(
        str(one) if names is None else f"{names[one.index]}: {one.reason}" for one in skipped[:1]
    )
    if not found:
        raise ConfigError(
            f"none of the first {batch_size} images of {images.index.paths[0]} can be read; the "
            f"first: {first}"
        )
    if skipped:
        lost = f"{len(skipped)} images are left out; the first: {printable(first)}"
        print(f"warning: {lost}", file=sys.stderr)
    return found


def check_image_size(model: VAE, size: Size, *, key: str) -> None:
    """Raises ConfigError, blaming `key`, when the model cannot work at this (H, W)."""
    if model.image_size is not None and size != model.image_size:
        trained = f"{model.image_size[0]}x{model.image_size[1]}"
        raise ConfigError(
            f"{key}: images of {size[0]}x{size[1]} pixels, but this model has a vector latent and "
            f"works at {trained} only; train with model.latent=spatial to use other sizes"
        )
