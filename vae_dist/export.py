"""Write a trained model for other programs.

python -m vae_dist.export run=runs/photos64_kl_f4 out=exported
"""

from __future__ import annotations

import sys
from pathlib import Path

from vae_dist.cli import run_command, writing
from vae_dist.config.commands import ExportCommand

KINDS = {"diffusers": "AutoencoderKL", "flux2": "AutoencoderKLFlux2"}
USAGE = "python -m vae_dist.export run=FOLDER out=FOLDER [key=value ...]"
INTRO = "Write the weights of a run as a folder that diffusers loads as AutoencoderKL."


def export(command: ExportCommand) -> None:
    from vae_dist.inference.diffusers import export_diffusers
    from vae_dist.inference.load import open_run

    out, run = Path(command.out), Path(command.run)
    with open_run(command, device="cpu") as loaded, writing(out):
        lines = export_diffusers(
            loaded, run, out, kind=KINDS[command.format], normalization=command.normalization
        )
    print("\n".join([*lines, f"step {loaded.step}, {command.weights} weights: {out}"]))


def main(argv: list[str] | None = None) -> int:
    return run_command(ExportCommand, export, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
