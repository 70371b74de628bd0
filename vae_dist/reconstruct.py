"""Show images above what a trained model makes of them.

python -m vae_dist.reconstruct run=runs/mnist out=reconstructions.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from vae_dist.cli import run_command
from vae_dist.config.commands import ReconstructCommand
from vae_dist.config.errors import ConfigError

USAGE = "python -m vae_dist.reconstruct run=FOLDER [key=value ...]"
INTRO = "Write a PNG grid of images, each above its reconstruction by a trained model."


def reconstruct(command: ReconstructCommand) -> None:
    from vae_dist.inference import sampling, tiles
    from vae_dist.inference.load import (
        check_image_size,
        first_examples_by_shape,
        load_model,
        open_images,
    )
    from vae_dist.tracking.images import save_png, side_by_side, with_holes

    loaded = load_model(command)
    images = open_images(loaded.config, command.data, create=True)
    tiles.check_tile(loaded.model, command.tile)
    check_image_size(loaded.model, images.settings.size, key=f"data={images.index.paths[0]}")
    inputs, outputs = [], []
    for same_shape in first_examples_by_shape(images, command.num_images):
        made = sampling.reconstruct(
            loaded.model,
            same_shape.images,
            seed=command.seed,
            batch_size=command.batch_size,
            labels=same_shape.labels,
            masks=same_shape.masks,
            tile=command.tile,
        )
        inputs += list(with_holes(same_shape.images, same_shape.masks))
        outputs += list(made)
    out = Path(command.out)
    try:
        save_png(side_by_side(inputs, outputs), out)
    except OSError as error:
        raise ConfigError(f"out={command.out}: cannot be written ({error.strerror})") from None
    print(
        f"{len(inputs)} images above their reconstructions at step {loaded.step} "
        f"({command.weights} weights): {out}"
    )


def main(argv: list[str] | None = None) -> int:
    return run_command(ReconstructCommand, reconstruct, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
