"""Draw images from the prior of a trained model.

python -m vae_dist.sample run=runs/mnist num_images=64 out=samples.png
python -m vae_dist.sample run=runs/mnist prior=gmm:10 compare=true
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_dist.cli import check_empty, run_command, writing
from vae_dist.config.commands import SampleCommand
from vae_dist.config.errors import ConfigError

if TYPE_CHECKING:
    from vae_dist.inference.load import LoadedModel

USAGE = "python -m vae_dist.sample run=FOLDER [key=value ...]"
INTRO = "Draw images from the prior of a trained model, as one PNG grid or as single images."


def sample(command: SampleCommand) -> None:
    from vae_dist.inference.load import open_run
    from vae_dist.inference.mixture import fitted_prior
    from vae_dist.inference.sampling import BatchedVAE
    from vae_dist.tracking.images import beside, grid, left_out, save_image, save_png

    out = Path(command.out)
    is_grid = out.suffix.lower() == ".png"
    if out.suffix and not is_grid:
        raise ConfigError(f"out={out}: give a name that ends in .png, or a folder for images")
    if command.compare and not is_grid:
        raise ConfigError(f"compare=true writes one picture; out={out} must end in .png")
    check_empty(out)
    with open_run(command, device=command.device) as loaded:
        vae, what = BatchedVAE(loaded.model, command.batch_size), _what_to_draw(command, loaded)
        columns = what["num_images"] if what["classes"] else None
        prior = fitted_prior(loaded, command) if command.prior != "normal" else None
        images = vae.sample(prior=prior, **what)
        pictures = [grid(images, columns=columns)] if is_grid else []
        if command.compare:
            pictures.insert(0, grid(vae.sample(**what), columns=columns))
    data = loaded.config.data
    with writing(out):
        if is_grid:
            save_png(beside(*pictures) if command.compare else pictures[0], out)
        else:
            for index, image in enumerate(images):
                save_image(image, out / f"{index:06d}", bits=data.bits)
    if prior:
        print(prior.description)
    if command.compare:
        print(f"left: draws of N(0, I); right: of {command.prior}, from the same noise")
    label = f"label={command.label}, " if loaded.model.num_classes else ""
    note = left_out(data.channels, data.bits) if is_grid else ""
    step = f"step {loaded.step} ({command.weights} weights)"
    print(f"{len(images)} samples, {label}{step}: {out}{note}")


def _what_to_draw(command: SampleCommand, loaded: LoadedModel) -> dict[str, Any]:
    """The arguments of `BatchedVAE.sample`. Raises ConfigError."""
    import torch

    from vae_dist.inference.load import check_image_size
    from vae_dist.models.latent import drawn_labels
    from vae_dist.models.vae import NO_LABEL

    model, label, num_images = loaded.model, command.label, command.num_images
    num_classes, classes, labels = model.num_classes, range(0), None
    if label != "auto" and not num_classes:
        raise ConfigError(
            f"label={label} has no effect: run={command.run} was trained without labels "
            "(model.num_classes=0); leave it out"
        )
    if isinstance(label, int) and label >= num_classes:
        raise ConfigError(f"label={label}: this model knows the classes 0 to {num_classes - 1}")
    if label == "all":
        num_images, classes = -(-num_images // num_classes), range(num_classes)
    elif label == "auto":
        labels = drawn_labels(num_classes, num_images, seed=command.seed)
    else:
        labels = torch.full((num_images,), NO_LABEL if label == "none" else label)
    size = loaded.image_size
    if command.resolution != "trained":
        asked = command.resolution
        size = (asked, asked) if isinstance(asked, int) else tuple(asked)
        check_image_size(model, size, key=f"resolution={asked}")
    return {
        "num_images": num_images,
        "classes": classes,
        "labels": labels,
        "size": size,
        "seed": command.seed,
        "temperature": command.temperature,
    }


def main(argv: list[str] | None = None) -> int:
    return run_command(SampleCommand, sample, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
