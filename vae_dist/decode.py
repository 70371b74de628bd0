"""Show what shards of latents hold: images decoded from them by the model that encoded them.

python -m vae_dist.decode run=runs/photos data=data/photos-latents out=decoded.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vae_dist.cli import run_command, writing
from vae_dist.config.commands import DecodeCommand

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from vae_dist.inference.latents import LatentSample

USAGE = "python -m vae_dist.decode run=FOLDER data=SHARDS [key=value ...]"
INTRO = "Decode latents to images, E[x|z]: one PNG grid, or a folder of images."


def decode(command: DecodeCommand) -> None:
    from vae_dist.data.index import load_index
    from vae_dist.inference.latents import decode_latents, read_latents
    from vae_dist.inference.load import open_run
    from vae_dist.tracking.images import left_out

    with open_run(command) as loaded:
        data = loaded.config.data
        index = load_index(command.data, key="data", create=True)
        latents = read_latents(index, loaded.model, loaded.config, num_images=command.num_images)
        decoded = decode_latents(
            loaded.model, latents, batch_size=command.batch_size, tile=command.tile
        )
        with writing(command.out):
            count = _write(Path(command.out), decoded, bits=data.bits)
    note = left_out(data.channels, data.bits) if command.out.endswith(".png") else ""
    print(
        f"{count} images of latents, at step {loaded.step} ({command.weights} weights): "
        f"{command.out}{note}"
    )


def _write(out: Path, decoded: Iterator[tuple[LatentSample, Tensor]], *, bits: int) -> int:
    """A grid, or a file for each image as it comes; how many."""
    from vae_dist.tracking.images import file_name, grid, save_image, save_png

    if out.suffix == ".png":
        images = [image for _, image in decoded]
        save_png(grid(images), out)
        return len(images)
    count = 0
    for sample, image in decoded:
        save_image(image, out / file_name(sample.number, sample.key), bits=bits)
        count += 1
    return count


def main(argv: list[str] | None = None) -> int:
    return run_command(DecodeCommand, decode, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
