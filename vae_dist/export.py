"""Write a trained model for other programs.

python -m vae_dist.export run=runs/photos64_kl_f4 out=exported
"""

from __future__ import annotations

import sys
from pathlib import Path

from vae_dist.cli import run_command, writing
from vae_dist.config.commands import ExportCommand
from vae_dist.config.errors import ConfigError

USAGE = "python -m vae_dist.export run=FOLDER out=FOLDER [key=value ...]"
INTRO = (
    "Write the weights of a run as a folder that diffusers loads as AutoencoderKL, or as one "
    "safetensors file with metadata; with push=, to the Hugging Face Hub as well."
)


def export(command: ExportCommand) -> None:
    from vae_dist.inference.diffusers import export_diffusers, export_safetensors
    from vae_dist.inference.load import open_run
    from vae_dist.models.diffusers import AUTOENCODER, FLUX2

    out, run = Path(command.out), Path(command.run)
    taken, place = (run / "checkpoints").resolve(), out.resolve()
    if place == run.resolve() or taken in (place, *place.parents):
        raise ConfigError(f"out={out} holds the run or its checkpoints; give another folder")
    with open_run(command, device="cpu") as loaded, writing(out):
        if command.format == "safetensors":
            lines = export_safetensors(loaded, run, out)
        else:
            kind = FLUX2 if command.format == "flux2" else AUTOENCODER
            lines = export_diffusers(
                loaded, run, out, kind=kind, normalization=command.normalization
            )
    print("\n".join([*lines, f"step {loaded.step}, {command.weights} weights: {out}"]))
    if command.push:
        print(f"pushed: {_push(out, command.push)}")


def _push(folder: Path, repo: str) -> str:
    """Upload what was written; the address of the commit."""
    from huggingface_hub import HfApi

    api, files = HfApi(), ["config.json", "README.md", "*.safetensors"]
    try:
        api.create_repo(repo, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files)
    except Exception as error:  # its transport, and so what it raises, differs by version
        raise ConfigError(
            f"push={repo}: {folder} is written, but the Hub did not take it ({error}); is there a "
            "login (hf auth login)?"
        ) from None
    return str(done.commit_url)


def main(argv: list[str] | None = None) -> int:
    return run_command(ExportCommand, export, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
