"""Show images above what a trained model makes of them.

python -m vae_dist.reconstruct run=runs/mnist out=reconstructions.png
"""

from __future__ import annotations

import sys

from vae_dist.cli import run_command, writing
from vae_dist.config.commands import ReconstructCommand

USAGE = "python -m vae_dist.reconstruct run=FOLDER [key=value ...]"
INTRO = "Write a PNG grid of images, each above its reconstruction by a trained model."


def reconstruct(command: ReconstructCommand) -> None:
    from vae_dist.inference.load import first_examples_by_shape, images_to_show, open_run
    from vae_dist.inference.sampling import BatchedVAE
    from vae_dist.tracking.images import left_out, save_png, side_by_side, with_holes

    inputs, outputs = [], []
    with open_run(command, device=command.device) as loaded:
        images = images_to_show(loaded, command.data)
        vae = BatchedVAE(loaded.model, command.batch_size, command.tile)
        for batch in first_examples_by_shape(images, command.num_images):
            shown = batch.images, batch.labels, batch.masks
            inputs += list(with_holes(batch.images, batch.masks))
            outputs += list(vae.reconstruct(*shown, levels=command.levels or None))
    with writing(command.out):
        save_png(side_by_side(inputs, outputs), command.out)
    print(
        f"{len(inputs)} images above their reconstructions at step {loaded.step} "
        f"({command.weights} weights): {command.out}"
        f"{left_out(loaded.config.data.channels, loaded.config.data.bits)}"
    )


def main(argv: list[str] | None = None) -> int:
    return run_command(ReconstructCommand, reconstruct, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
