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
    from vae_dist.inference import tiles
    from vae_dist.inference.encoding.folder import encode_images
    from vae_dist.inference.load import images_to_show, open_run_on_ranks

    remedy = "ask for more memory; then the same command goes on"
    with open_run_on_ranks(command, remedy=remedy) as (loaded, runtime):
        if command.precision != "no" and runtime.device.type == "cpu":
            raise ConfigError(
                f"precision={command.precision} is for accelerators, and this is the CPU; leave it "
                "out"
            )
        tiles.check_tile(loaded.model, command.tile)
        if command.resolution != "trained":
            loaded.config.data.resolution = command.resolution
        images = images_to_show(loaded, command.data, runtime=runtime)
        encoded = encode_images(loaded, images, command, runtime)
        if runtime.is_main:
            _say(command, encoded, runtime)


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
