"""Draw images from the prior of a trained model.

python -m vae_dist.sample run=runs/mnist num_images=64 out=samples.png
python -m vae_dist.sample run=runs/mnist prior=gmm:10 compare=true
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_dist.cli import run_command, writing
from vae_dist.config.commands import SampleCommand
from vae_dist.config.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from vae_dist.inference.load import LoadedModel
    from vae_dist.models.latent import LatentPrior

USAGE = "python -m vae_dist.sample run=FOLDER [key=value ...]"
INTRO = "Draw images from the prior of a trained model, as one PNG grid or as single images."


def sample(command: SampleCommand) -> None:
    from vae_dist.inference.load import open_run
    from vae_dist.inference.mixture import fitted_prior
    from vae_dist.tracking.images import beside, grid, left_out, save_image, save_png

    out = Path(command.out)
    is_grid = out.suffix.lower() == ".png"
    if out.suffix and not is_grid:
        raise ConfigError(f"out={out}: give a name that ends in .png, or a folder for images")
    if command.compare and not is_grid:
        raise ConfigError(f"compare=true writes one picture; out={out} must end in .png")
    with open_run(command) as loaded:
        _check_label(command, loaded.model.num_classes)
        size = _size(command, loaded)
        fitted = fitted_prior(loaded, command) if command.prior != "normal" else None
        images, columns = _draw(command, loaded, size, fitted.mixture if fitted else None)
        others = _draw(command, loaded, size, None)[0] if command.compare else None
    data = loaded.config.data
    note = left_out(data.channels, data.bits) if is_grid else ""
    with writing(out):
        if others is not None:
            save_png(beside(grid(others, columns=columns), grid(images, columns=columns)), out)
        elif is_grid:
            save_png(grid(images, columns=columns), out)
        else:
            for index, image in enumerate(images):
                save_image(image, out / f"{index:06d}", bits=data.bits)
    if fitted:
        print(fitted.description)
    if command.compare:
        print(f"left: draws of N(0, I); right: of {command.prior}, from the same noise")
    label = f"label={command.label}, " if loaded.model.num_classes else ""
    step = f"step {loaded.step} ({command.weights} weights)"
    print(f"{len(images)} samples, {label}{step}: {out}{note}")


def _size(command: SampleCommand, loaded: LoadedModel) -> tuple[int, int]:
    """(H, W) of the images."""
    from vae_dist.inference.load import check_image_size

    asked = command.resolution
    if asked == "trained":
        return loaded.image_size
    height, width = (asked, asked) if isinstance(asked, int) else asked
    check_image_size(loaded.model, (height, width), key=f"resolution={asked}")
    return height, width


def _draw(
    command: SampleCommand,
    loaded: LoadedModel,
    size: tuple[int, int],
    prior: LatentPrior | None,
) -> tuple[Tensor, int | None]:
    """The images, and the columns of their grid where it has a row for each class."""
    from vae_dist.inference.sampling import sample_classes, sample_prior

    model, num_classes = loaded.model, loaded.model.num_classes
    options: dict[str, Any] = {
        "seed": command.seed,
        "temperature": command.temperature,
        "prior": prior,
        "batch_size": command.batch_size,
    }
    if command.label == "all":
        columns = -(-command.num_images // num_classes)
        return sample_classes(model, range(num_classes), columns, size, **options), columns
    labels = _labels(command, num_classes)
    return sample_prior(model, command.num_images, size, labels=labels, **options), None


def _labels(command: SampleCommand, num_classes: int) -> Tensor | None:
    """The label of each image, int64 (num_images,); None for a model without labels."""
    import torch

    from vae_dist.models.latent import drawn_labels
    from vae_dist.models.vae import NO_LABEL

    if command.label == "auto":
        return drawn_labels(num_classes, command.num_images, seed=command.seed)
    return torch.full((command.num_images,), NO_LABEL if command.label == "none" else command.label)


def _check_label(command: SampleCommand, num_classes: int) -> None:
    if command.label != "auto" and not num_classes:
        raise ConfigError(
            f"label={command.label} has no effect: run={command.run} was trained without labels "
            "(model.num_classes=0); leave it out"
        )
    if isinstance(command.label, int) and command.label >= num_classes:
        raise ConfigError(
            f"label={command.label}: this model knows the classes 0 to {num_classes - 1}"
        )


def main(argv: list[str] | None = None) -> int:
    return run_command(SampleCommand, sample, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
