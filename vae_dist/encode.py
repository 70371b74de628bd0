"""Encode a data set: shards of images to shards of latents, for training on latents.

    python -m vae_dist.encode run=runs/photos data=data/photos/train out=data/photos-latents
    accelerate launch --multi_gpu --num_processes 8 -m vae_dist.encode run=... data=... out=...

The shards are the same for any number of processes. Killed, the same command goes on from the
shards that are done.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vae_dist.cli import exit_process, run_command
from vae_dist.config.commands import EncodeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import RuntimeConfig

if TYPE_CHECKING:
    from vae_dist.distributed import Runtime
    from vae_dist.inference.encoding.folder import Encoded

USAGE = "python -m vae_dist.encode run=FOLDER data=SHARDS out=FOLDER [key=value ...]"
INTRO = (
    "Write the latents of a data set as WebDataset shards, with keys, labels and other members, "
    "their index, and latents.json: scaling_factor and shift_factor."
)
NUM_NAMED = 5  # images left out that the screen shows


def encode(command: EncodeCommand) -> None:
    from vae_dist.data.workers import deaths_explained
    from vae_dist.distributed import Runtime

    runtime = Runtime.start(
        RuntimeConfig(device=command.device, threads=command.threads),
        precision="no",
        launcher_decides_nothing=True,
    )
    try:
        if command.precision != "no" and runtime.device.type == "cpu":
            raise ConfigError(
                f"precision={command.precision} is for accelerators, and this is the CPU; leave it "
                "out"
            )
        with deaths_explained("ask for more memory; then the same command goes on"):
            encoded = _encode(command, runtime)
        if runtime.is_main:
            _say(command, encoded, runtime)
    finally:
        runtime.stop()


def _encode(command: EncodeCommand, runtime: Runtime) -> Encoded:
    import torch

    from vae_dist.inference import tiles
    from vae_dist.inference.encoding.folder import encode_images
    from vae_dist.inference.load import check_image_size, load_model, open_images

    loaded = runtime.together(lambda: load_model(command, device=runtime.device))
    tiles.check_tile(loaded.model, command.tile)
    # cuDNN's default rounds the inputs of convolutions to 10 bits
    torch.backends.cudnn.allow_tf32 = False
    if command.resolution != "trained":
        loaded.config.data.resolution = command.resolution

    def make_what_is_missing() -> None:
        open_images(loaded.config, command.data, create=True)

    runtime.on_main(make_what_is_missing)
    images = runtime.together(lambda: open_images(loaded.config, command.data, create=False))
    check_image_size(loaded.model, images.settings.size, key=f"data={images.index.paths[0]}")
    return encode_images(loaded, images, command, runtime)


def _say(command: EncodeCommand, encoded: Encoded, runtime: Runtime) -> None:
    summary, speed = encoded.summary, encoded.images_per_second
    for reason in summary["skipped"][:NUM_NAMED]:
        print(f"left out: {reason}", file=sys.stderr)
    if len(summary["skipped"]) > NUM_NAMED:
        more = len(summary["skipped"]) - NUM_NAMED
        print(f"left out: {more} more, listed in {command.out}/encode.json", file=sys.stderr)
    print(
        f"{command.out}: latents of {summary['samples']:,} images ({len(summary['skipped'])} left "
        f"out) in {summary['shards']} shards, {summary['bytes'] / 1e6:.1f} MB, at step "
        f"{summary['step']} ({summary['weights']} weights)"
    )
    statistics = summary["statistics"]
    print(
        f"scaling_factor={statistics['scaling_factor']:.5f} "
        f"shift_factor={statistics['shift_factor']:.5f} (latents.json)"
    )
    if speed is None:
        print("finished already; nothing is left to do")
    else:
        where = f"{runtime.world} x {runtime.device.type}"
        print(f"images_per_second={speed:.1f} on {where}")


def main(argv: list[str] | None = None) -> int:
    return run_command(EncodeCommand, encode, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    exit_process(main())
