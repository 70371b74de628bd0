"""Fill the missing pixels of images with a trained model.

    python -m vae_dist.impute run=runs/mnist_missing out=imputed
    python -m vae_dist.impute run=runs/celeba64 data=FOLDER method=gibbs samples=50 out=imputed

In: shards, or a folder of pictures (alpha channel, or NAME.mask.png beside NAME.png, white where a
pixel was observed). Out: `overview.png`, `imputed.json`, and for each image a folder with its mean,
draws and standard deviation as PNG and .npy. Observed pixels are those of the input, exactly.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from vae_dist.cli import check_empty, run_command, writing
from vae_dist.config.commands import ImputeCommand
from vae_dist.config.errors import ConfigError

if TYPE_CHECKING:
    from vae_dist.inference.impute import FilledImage
    from vae_dist.inference.load import LoadedModel

USAGE = "python -m vae_dist.impute run=FOLDER [key=value ...]"
INTRO = (
    "Fill the missing pixels of images: their mean, draws and uncertainty under a trained model."
)
FEW = 10  # effective draws: the mean is hardly one


def impute(command: ImputeCommand) -> None:
    import numpy as np

    from vae_dist.data.transforms import DRAWN
    from vae_dist.files import printable, write_durably
    from vae_dist.inference.load import open_run
    from vae_dist.tracking.images import grid, left_out, save_png, single, to_uint8

    out = Path(command.out)
    check_empty(out)
    with open_run(command, device=command.device) as loaded, TemporaryDirectory() as scratch:
        if loaded.model.num_levels and command.method != "importance":
            raise ConfigError(f"method={command.method}: a ladder is filled by method=importance")
        filled = _filled(command, loaded, Path(scratch))
    records, rows = [], []
    with writing(out):
        for one in filled:
            pictures = one.pictures()
            for name, picture in pictures.items():
                save_png(single(picture), out / one.folder / f"{name}.png")
            for name, values in one.arrays().items():
                np.save(out / one.folder / f"{name}.npy", values.numpy())
            truth = [to_uint8(one.stored)] * (loaded.config.data.mask in DRAWN)
            rows.append([*truth, *pictures.values()])
            records.append(
                {
                    "folder": one.folder,
                    "key": printable(one.key),
                    "missing_fraction": 1.0 - float(one.mask.float().mean()),
                    "effective_samples": float(one.imputed.effective_samples),
                }
            )
        overview = grid([cell for row in rows for cell in row], columns=len(rows[0]))
        save_png(overview, out / "overview.png")
        facts = {"run": str(Path(command.run).resolve()), "step": loaded.step, "images": records}
        write_durably(out / "imputed.json", (json.dumps(facts, indent=1) + "\n").encode())
    print(
        f"{len(filled)} images filled by method={command.method} at step {loaded.step} "
        f"({command.weights} weights): {out}"
        f"{left_out(loaded.config.data.channels, loaded.config.data.bits)}"
    )
    if command.method == "importance":
        effective = sorted(float(one.imputed.effective_samples) for one in filled)
        print(
            f"effective draws of z, of {command.samples}: {effective[0]:.1f} in the worst image, "
            f"{effective[len(effective) // 2]:.1f} in the median"
        )
        if effective[0] < FEW:
            others = "" if loaded.model.num_levels else " or take method=gibbs"
            print(f"these are few: raise samples={others}")


def _filled(command: ImputeCommand, loaded: LoadedModel, scratch: Path) -> list[FilledImage]:
    from vae_dist.inference.impute import fill, pictures_of, write_pictures
    from vae_dist.inference.load import check_image_size, open_images

    config, data, names = loaded.config, command.data, None
    pictures = pictures_of(data)[: command.num_images] if data and isinstance(data, str) else []
    if pictures:
        data, names = str(scratch / "shards"), [path.stem for path in pictures]
        config.data.mask = write_pictures(pictures, Path(data))
    if command.mask != "auto":
        config.data.mask = command.mask
        config.data.mask_fraction = command.mask_fraction
    if config.data.mask == "none":
        raise ConfigError(
            f"run={command.run} was trained on complete images, so nothing says what is missing; "
            "give mask=member, alpha or nan, or one to try with: half, rectangle, random"
        )
    images = open_images(config, data, create=True)
    if names is not None and loaded.model.image_size is not None:
        images = images.at_one_size(loaded.model.image_size)
    check_image_size(loaded.model, images.settings.size, key=f"data={command.data or 'validation'}")
    return fill(loaded.model, images, command, names=names)


def main(argv: list[str] | None = None) -> int:
    return run_command(ImputeCommand, impute, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
