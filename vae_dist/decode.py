"""Show what shards of latents hold: images decoded from them by the model that encoded them.

python -m vae_dist.decode run=runs/photos data=data/photos-latents out=decoded.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from vae_dist.cli import check_empty, run_command, writing
from vae_dist.config.commands import DecodeCommand

USAGE = "python -m vae_dist.decode run=FOLDER data=SHARDS [key=value ...]"
INTRO = "Decode latents to images, E[x|z]: one PNG grid, or a folder of images."


def decode(command: DecodeCommand) -> None:
    from vae_dist.inference.latents import decode_latents, open_latents, read_latents
    from vae_dist.inference.load import open_run
    from vae_dist.tracking.images import file_name, grid, left_out, save_image, save_png

    out = Path(command.out)
    is_grid = out.suffix == ".png"
    check_empty(out)
    with open_run(command, device=command.device) as loaded:
        data = loaded.config.data
        latents = open_latents(loaded.config, command.data)
        samples = read_latents(latents, loaded.model, num_images=command.num_images)
        decoded = decode_latents(
            loaded.model, samples, batch_size=command.batch_size, tile=command.tile
        )
        with writing(out):
            if is_grid:
                save_png(grid([image for _, image in decoded]), out)
            else:
                for sample, image in decoded:
                    save_image(image, out / file_name(sample.number, sample.key), bits=data.bits)
    count = min(command.num_images, latents.index.num_samples)
    print(
        f"{count} images of latents, at step {loaded.step} ({command.weights} weights): "
        f"{out}{left_out(data.channels, data.bits) if is_grid else ''}"
    )


def main(argv: list[str] | None = None) -> int:
    return run_command(DecodeCommand, decode, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
