"""A run folder as training leaves it, made in a moment: config, log, pictures, session, results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from tests.support.tiny_run import tiny_config
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.environment import add_session, describe_environment
from vae_dist.tracking.images import grid, save_png
from vae_dist.tracking.sinks import JsonlSink

EVALUATED = (100, 200, 300, 400)


def write_report_run(path: Path, *, lr: float = 1e-3, level: float = 90.0) -> RunFolder:
    """400 steps, a row each 4, evaluated at 100, 200, 300 and 400; `level` is the final -ELBO."""
    folder = RunFolder(path)
    folder.create()
    config = tiny_config()
    config.run, config.optimizer.lr, config.training.steps = str(path), lr, 400
    folder.write_config(config)
    log = JsonlSink(folder.log_path, resume_step=0)
    for step in range(4, 401, 4):
        loss = level + 300 * math.exp(-step / 50)
        row: dict[str, float | list[float]] = {
            "train/neg_elbo_nats": loss,
            "train/beta": 1.0,
            "optim/lr": lr,
            "time/images_per_second": 1000.0,
            "time/step_seconds": 0.064,
        }
        if step in EVALUATED:
            row |= {"eval/neg_elbo_nats": loss + 1, "eval/bits_per_dim": loss / 543}
            row |= {"latent/kl_nats_per_unit": [3.0, step / 400, 0.01], "latent/active_units": 2}
        log.log(step, row)
    log.close("finished")
    for step in EVALUATED:
        for name in ("samples", "reconstructions"):
            images = torch.full((16, 1, 28, 28), step // 4, dtype=torch.uint8)
            save_png(grid(images), folder.images / f"{name}_{step:08d}.png")
    session = describe_environment(first_step=0, world=1, device=torch.device("cpu"))
    add_session(path / "environment.json", session)
    folder.write_status("finished", step=400, reason="all steps are done")
    results = {"step": 400, "weights": "ema", "precision": "float32", "data": "shards"}
    results["figures"] = {"neg_elbo_nats": level}  # type: ignore[assignment]
    (path / "results.json").write_text(json.dumps(results))
    return folder
