"""Send a run's rows and pictures to W&B: `python -m vae_dist.upload run=runs/mnist`.

What the W&B run holds already is asked of the server, and the rest comes from log.jsonl and the
pictures: each point arrives once, whatever the sessions of the run were, online or offline, and
however they ended. `wandb sync` sends a session from its beginning instead.
"""

from __future__ import annotations

import sys

from vae_dist.cli import run_command
from vae_dist.config.commands import UploadCommand
from vae_dist.config.errors import ConfigError

USAGE = "python -m vae_dist.upload run=FOLDER [key=value ...]"
INTRO = "Send to W&B what it lacks of a run: rows of log.jsonl and pictures, each point once."


def upload(command: UploadCommand) -> None:
    from vae_dist.run.folder import RunFolder, RunLock
    from vae_dist.tracking.environment import read_sessions
    from vae_dist.tracking.sinks import read_rows
    from vae_dist.tracking.wandb_modes import asked_mode
    from vae_dist.tracking.wandb_record import find_parts, mark_synced
    from vae_dist.tracking.wandb_sink import WandbSink

    folder = RunFolder(command.run)
    config = folder.config()
    if asked_mode("online")[0] != "online":
        raise ConfigError("WANDB_MODE keeps W&B offline; unset it to upload")
    config.wandb.mode = "online"
    config.wandb.finish_timeout_s = command.timeout_s
    with RunLock(folder):  # a trainer that is at work sends its points itself
        last = max((step for step, _ in read_rows(folder.log_path)), default=0)
        if last == 0:
            raise ConfigError(f"run={folder.path}: log.jsonl has no rows yet; train first")
        sessions = read_sessions(folder.path / "environment.json")
        try:
            sink = WandbSink(
                config,
                folder.path,
                resume_step=last,
                environment=sessions[-1] if sessions else None,
            )
        except ConfigError as error:
            reason = str(error).removeprefix("wandb.mode=online but ").partition(";")[0]
            raise ConfigError(f"an upload needs W&B to answer, but {reason}") from None
        sink.backfill(folder.log_path, folder.images, up_to=last)
        # an interrupted trainer has little time to close; this command has timeout_s
        status = folder.status().get("status")
        sink.close("finished" if status == "finished" else "failed")
        if not sink.lacks_points:
            for part in find_parts(folder.path, sink.run_id):
                mark_synced(part)
    if sink.lacks_points:
        raise ConfigError(f"run={folder.path}: not everything arrived; the same command goes on")
    print(f"uploaded: {folder.path} up to step {last}: {sink.url}")


def main(argv: list[str] | None = None) -> int:
    return run_command(UploadCommand, upload, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
