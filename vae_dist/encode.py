"""Encode a data set: shards of images to shards of latents, for training on latents; or to the same
shards with features of a vision model, for training with objective.alignment.

    python -m vae_dist.encode run=runs/photos data=data/photos/train out=data/photos-latents
    accelerate launch --multi_gpu --num_processes 8 -m vae_dist.encode run=... data=... out=...
    python -m vae_dist.encode features=facebook/dinov2-base data=... resolution=256 out=...

The shards are the same for any number of processes. Killed, the same command goes on from the
shards that are done.
"""

from __future__ import annotations

from vae_dist.cli import exit_process, run_command
from vae_dist.config.commands import EncodeCommand

USAGE = "python -m vae_dist.encode run=FOLDER|features=MODEL data=SHARDS out=FOLDER [key=value ...]"
INTRO = (
    "Write the latents of a data set as WebDataset shards, with keys, labels and other members, "
    "their index, and latents.json: scaling_factor and shift_factor. With features=MODEL, write "
    "the same samples again with patch features of a vision model, for objective.alignment."
)


def _encode(command: EncodeCommand) -> None:
    # torch, once the keys are right
    from vae_dist.packing.encode import encode, encode_features

    (encode_features if command.features else encode)(command)


def main(argv: list[str] | None = None) -> int:
    return run_command(EncodeCommand, _encode, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    exit_process(main())
