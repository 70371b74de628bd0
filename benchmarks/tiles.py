"""How far are tiled results from untiled ones, for a trained autoencoder?

python -m benchmarks.tiles run=runs/photos64_kl_f4 [num_images=16] [tiles=64,96,128]

The run's validation images at their own size, in float32. For each size of tile: the difference of
the latent means in parts of their spread; the PSNR of the tiled reconstruction against the untiled
one; the PSNR of both against the image; and the largest step across a seam, in 8-bit levels, of the
difference between the two. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys

import torch

from vae_dist.config.commands import RunCommand
from vae_dist.inference import tiles
from vae_dist.inference.load import first_examples_by_shape, load_model, open_images


def psnr_db(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of images in [-1, 1]."""
    return float(10 * torch.log10(4 / (one - other).square().mean()))


@torch.inference_mode()
def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    loaded = load_model(RunCommand(run=options["run"], device="cpu"))
    model, config = loaded.model, loaded.config
    config.data.resolution, config.data.crop, config.data.flip = "native", "center", False
    found, num_images = open_images(config, "", create=True), int(options.get("num_images", 16))
    examples = first_examples_by_shape(found.at_one_size(), num_images)[0]
    images = examples.images.float() / 127.5 - 1
    size = images.shape[-2], images.shape[-1]
    mean, _ = model.encode(images)
    untiled = model.likelihood.mean(model.decode(mean, size))
    results = {}
    for tile in map(int, options.get("tiles", "64,96,128").split(",")):
        tiled_mean, _ = tiles.encode(model, images, tile=tile)
        params = tiles.decode(model, tiled_mean, size, tile=tile)
        tiled = model.likelihood.mean(params)
        results[tile] = {
            "latent_rms": float((tiled_mean - mean).square().mean().sqrt() / mean.std()),
            "psnr_of_untiled_db": psnr_db(tiled, untiled),
            "psnr_of_image_db": psnr_db(tiled, images),
            "step_levels": float((tiled - untiled).diff(dim=-1).abs().max() * 127.5),
        }
        print(f"tile={tile}: " + ", ".join(f"{k}={v:.4g}" for k, v in results[tile].items()))
    print(
        json.dumps(
            {
                "step": loaded.step,
                "num_images": len(images),
                "size": list(size),
                "psnr_of_image_db": psnr_db(untiled, images),
                "tiles": results,
            }
        )
    )


if __name__ == "__main__":
    main()
