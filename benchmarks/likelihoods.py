"""Which likelihood suits photographs of faces? The same network and CPU seconds for each.

    python -m benchmarks.likelihoods data=FOLDER [seconds=200] [out=likelihoods.png]
                                     ['only=NAME;NAME'] [config=celeba64] [key=value ...]

In: shards of images under FOLDER/train and FOLDER/validation, as `pack` writes them; keys of a
training run on top of those in `SMALL`. Each likelihood trains for `seconds` of this process' CPU
time, so that other jobs on the machine do not matter, then averaged weights are evaluated on all
validation images: bits/dim (by -ELBO), PSNR of reconstructions from E[z|x], rate. Out: a table, a
PNG and a JSON object as the last line. The PNG has validation images in its first row, then for
each likelihood three rows: reconstructions, E[x|z] for draws of the prior, and draws of p(x|z) for
the same z.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.setting import Setting, make_setting
from vae_dist.config.schema import TrainConfig
from vae_dist.data.evaluation import EvaluationStream
from vae_dist.distributed import Runtime
from vae_dist.evaluation.metrics import ReconstructionMetric, psnr_db
from vae_dist.evaluation.run import evaluate
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.latent import prior_latents
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator
from vae_dist.tracking.images import grid, save_png, to_uint8
from vae_dist.training.data import Data, training_stream
from vae_dist.training.step import TrainingStep

COLUMNS = 12  # images of a strip
GAUSSIAN, DISCRETIZED = "likelihood.kind=gaussian", "likelihood.kind=discretized_gaussian"
LIKELIHOODS: dict[str, list[str]] = {
    "gaussian, sigma 0.1": [GAUSSIAN, "likelihood.variance=fixed"],
    "gaussian, shared": [GAUSSIAN, "likelihood.variance=shared"],
    "gaussian, per pixel": [GAUSSIAN, "likelihood.variance=per_pixel"],
    "discretized gaussian, shared": [DISCRETIZED, "likelihood.variance=shared"],
    "discretized gaussian, per pixel": [DISCRETIZED, "likelihood.variance=per_pixel"],
    "logistic mixture, K=5": [
        "likelihood.kind=discretized_logistic_mixture",
        "likelihood.mixtures=5",
    ],
}
# A network and a schedule for minutes of one CPU core. The number of steps is whatever the seconds
# allow, so nothing may depend on it.
SMALL = [
    "model.channels=[32,64,128]",
    "model.patch=4",
    "model.blocks=1",
    "model.attention=false",
    "optimizer.lr=1e-3",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=50",
    "optimizer.clip_grad_norm=5000",
    "training.batch_size=32",
    "training.ema_decay=0.98",
    "data.workers=0",
    "runtime.threads=1",
]


@dataclass(frozen=True)
class Row:
    name: str
    bits_per_dim: float
    psnr_db: float
    rate_nats: float
    neg_elbo_nats: float
    at_floor_fraction: float | None
    steps: int
    skipped_steps: int
    milliseconds_per_step: float  # of CPU time


def train(
    config: TrainConfig, runtime: Runtime, data: Data, *, seconds: float
) -> tuple[VAE, int, int, float]:
    """Averaged weights, steps, those that were skipped, CPU seconds."""
    step = TrainingStep(config, runtime, data.image_size)
    begun, skipped = time.process_time(), 0.0
    spent, number = 0.0, 0
    for number, batch in enumerate(training_stream(config, runtime, data, 0), start=1):
        report = step(batch, number - 1)
        skipped += float(report.found_inf)
        spent = time.process_time() - begun
        if spent > seconds:
            break
    average = step.ema.module
    assert isinstance(average, VAE)
    return average.eval(), number, int(skipped), spent


def validation(config: TrainConfig, data: Data, runtime: Runtime) -> EvaluationStream:
    return EvaluationStream(
        data.validation,
        data.evaluation_settings,
        batch_size=64,
        rank=runtime.rank,
        world=runtime.world,
    )


@torch.inference_mode()
def strips(model: VAE, images: torch.Tensor, data: Data) -> list[torch.Tensor]:
    """Reconstructions, prior means, prior draws; each uint8 (COLUMNS, C, H, W)."""
    size = data.image_size
    z = prior_latents(model.latent_shape(*size), COLUMNS, seed=0)
    params = model.decode(z, size)
    draws = model.likelihood.sample(params, torch_generator(0, "draws"))
    pictures = [BatchedVAE(model).reconstruct(images), model.likelihood.mean(params), draws]
    return [to_uint8(picture) for picture in pictures]


def main(arguments: list[str]) -> int:
    options: dict[str, str] = {
        "data": "",
        "seconds": "200",
        "out": "likelihoods.png",
        "only": "",
        "config": "celeba64",
    }
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in options:
            options[key] = value
        else:
            overrides.append(argument)
    if not options["data"]:
        print(__doc__)
        return 2
    names = options["only"].split(";") if options["only"] else list(LIKELIHOODS)
    results, pictures = [], []
    for name in names:
        setting = make_setting(
            [
                f"config={options['config']}",
                f"data.train={options['data']}/train",
                f"data.validation={options['data']}/validation",
                *SMALL,
                *overrides,
                *LIKELIHOODS[name],
            ]
        )
        row, rows_of_pictures, first = run(name, setting, float(options["seconds"]))
        results.append(row)
        pictures += rows_of_pictures if pictures else [first, *rows_of_pictures]
        print(table(results), flush=True)
        save_png(grid(torch.cat(pictures), columns=COLUMNS), options["out"])
    print(json.dumps({"seconds": float(options["seconds"]), "rows": [asdict(r) for r in results]}))
    return 0


def run(
    name: str, setting: Setting, seconds: float
) -> tuple[Row, list[torch.Tensor], torch.Tensor]:
    config, runtime, data = setting.config, setting.runtime, setting.data
    model, steps, skipped, spent = train(config, runtime, data, seconds=seconds)
    meter = ReconstructionMetric({"psnr_db": (psnr_db, 1)}, runtime.device)
    stream = validation(config, data, runtime)
    result = evaluate(model, stream, runtime=runtime, seed=0, metrics=[meter])
    assert result is not None
    figures = result.figures
    first = next(iter(validation(config, data, runtime))).images[:COLUMNS]
    row = Row(
        name=name,
        bits_per_dim=figures["bits_per_dim"],
        psnr_db=figures["psnr_db"],
        rate_nats=figures["rate_nats"],
        neg_elbo_nats=figures["neg_elbo_nats"],
        at_floor_fraction=figures.get("variance_at_floor_fraction"),
        steps=steps,
        skipped_steps=skipped,
        milliseconds_per_step=1000 * spent / steps,
    )
    return row, strips(model, first, data), first


def table(rows: list[Row]) -> str:
    titles = "likelihood", "bits/dim", "PSNR dB", "rate nats", "at floor", "steps", "ms/step"
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        floor = "" if row.at_floor_fraction is None else f"{row.at_floor_fraction:.1%}"
        cells: list[Any] = [
            row.name,
            f"{row.bits_per_dim:.3f}",
            f"{row.psnr_db:.2f}",
            f"{row.rate_nats:.1f}",
            floor,
            row.steps,
            f"{row.milliseconds_per_step:.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
