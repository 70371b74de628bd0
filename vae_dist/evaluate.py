"""Evaluate a trained model on a data set: -ELBO, rate, distortion, bits/dim, in float32.

    python -m vae_dist.evaluate run=runs/mnist
    accelerate launch --multi_gpu --num_processes 8 -m vae_dist.evaluate run=runs/celeba64

Writes `results.json` in the run folder. The figures do not depend on the number of processes.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_dist.command import run_command
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import EvaluateCommand, RuntimeConfig

if TYPE_CHECKING:
    from vae_dist.evaluation.run import EvaluationResult
    from vae_dist.runtime import Runtime

USAGE = "python -m vae_dist.evaluate run=FOLDER [key=value ...]"
INTRO = "Evaluate a trained model on its validation shards, or others, and write results.json."


def evaluate(command: EvaluateCommand) -> None:
    from vae_dist.runtime import Runtime

    runtime = Runtime.start(
        RuntimeConfig(device=command.device), precision="no", launcher_decides_nothing=True
    )
    try:
        _evaluate(command, runtime)
    finally:
        runtime.stop()


def _evaluate(command: EvaluateCommand, runtime: Runtime) -> None:
    from vae_dist.data.stream import EvaluationStream
    from vae_dist.evaluation import run
    from vae_dist.inference.load import check_image_size, load_model, open_images

    loaded = load_model(command, device=runtime.device)

    def make_what_is_missing() -> None:
        open_images(loaded.config, command.data, create=True)

    runtime.on_main(make_what_is_missing)
    images = open_images(loaded.config, command.data, create=False)
    check_image_size(loaded.model, images.settings.size, key=f"data={images.index.paths[0]}")
    stream = EvaluationStream(
        images.index,
        images.settings,
        batch_size=command.batch_size,
        rank=runtime.rank,
        world=runtime.world,
        workers=loaded.config.data.workers,
    )
    result = run.evaluate(loaded.model, stream, runtime=runtime, seed=command.seed)
    assert result is not None  # nothing asks it to stop
    out = Path(command.out) if command.out else Path(command.run) / "results.json"
    record = {
        "run": str(Path(command.run).resolve()),
        "step": loaded.step,
        "weights": command.weights,
        "data": command.data or loaded.config.data.validation,
        "data_fingerprint": images.index.fingerprint,
        "seed": command.seed,
        "precision": "float32",
        "figures": result.figures(),
        "world": runtime.world,
        "device": runtime.device.type,
        "versions": _versions(),
    }
    runtime.on_main(lambda: _write(out, record))
    if runtime.is_main:
        print(f"{command.run}, step {loaded.step}, {command.weights} weights, float32")
        print(_table(result))
        print(f"written to {out}")


def _write(out: Path, record: dict[str, Any]) -> None:
    from vae_dist.files import write_durably

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(out, (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror})") from None


def _table(result: EvaluationResult) -> str:
    lines = [
        ("-ELBO", f"{result.neg_elbo_nats:.3f}", "nats per image"),
        ("distortion", f"{result.distortion_nats:.3f}", "nats per image"),
        ("rate", f"{result.rate_nats:.3f}", "nats per image"),
        ("bits/dim", f"{result.bits_per_dim:.4f}", ""),
        ("images", f"{result.num_images}", f"{result.skipped_samples} unreadable"),
    ]
    if result.variance_at_floor_fraction is not None:
        lines.append(("at the floor", f"{result.variance_at_floor_fraction:.2%}", "of variances"))
    return "\n".join(f"  {name:<13}{value:>12}  {unit}".rstrip() for name, value, unit in lines)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("vae_dist", "torch", "accelerate", "webdataset", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            versions[name] = "not installed"
    return versions


def main(argv: list[str] | None = None) -> int:
    return run_command(EvaluateCommand, evaluate, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
