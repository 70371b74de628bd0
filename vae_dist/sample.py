"""Draw images from the prior of a trained model.

python -m vae_dist.sample run=runs/mnist num_images=64 out=samples.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from vae_dist.command import run_command
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import SampleCommand

USAGE = "python -m vae_dist.sample run=FOLDER [key=value ...]"
INTRO = "Draw images from the prior of a trained model, as one PNG grid or as single PNGs."


def sample(command: SampleCommand) -> None:
    from vae_dist.inference.load import check_image_size, load_model
    from vae_dist.inference.sampling import sample_prior
    from vae_dist.tracking.images import grid, save_png, single

    out = Path(command.out)
    if out.suffix.lower() not in ("", ".png"):
        raise ConfigError(f"out={out}: give a name that ends in .png, or a folder for single PNGs")
    loaded = load_model(command)
    size = loaded.image_size
    if command.resolution != "trained":
        asked = command.resolution
        height, width = (asked, asked) if isinstance(asked, int) else asked
        size = (height, width)
        check_image_size(loaded.model, size, key=f"resolution={asked}")
    images = sample_prior(
        loaded.model,
        command.num_images,
        size,
        seed=command.seed,
        temperature=command.temperature,
        batch_size=command.batch_size,
    )
    try:
        if out.suffix.lower() == ".png":
            save_png(grid(images), out)
        else:
            for index, image in enumerate(images):
                save_png(single(image), out / f"{index:06d}.png")
    except OSError as error:
        raise ConfigError(f"out={command.out}: cannot be written ({error.strerror})") from None
    print(f"{len(images)} samples of step {loaded.step} ({command.weights} weights): {out}")


def main(argv: list[str] | None = None) -> int:
    return run_command(SampleCommand, sample, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
