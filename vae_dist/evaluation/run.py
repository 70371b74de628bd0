"""The figures of a model on a data set, each image once over all ranks.

What goes in: a VAE and this rank's evaluation batches, each of one shape. What comes out: means
over all images of

    -ELBO = distortion + rate,   distortion = -log p(x|z),   rate = KL(q(z|x) || p(z)),   z ~ q

in nats per image (beta = 1), and bits per dim = (-ELBO of all images as nats of 8-bit levels) /
(values of all images x ln 2), so that images of different shapes mix; then the metrics that are
passed along. Encoder and decoder run once per image, for the bound and for all metrics.
The draws belong to the sample's number, so they are the same at every evaluation; sums are float64.
The figures are therefore equal for any number of ranks and any batch size to 1e-5.

Legend: b images of a rank's batch, C H W an image, D = C H W.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vae_dist.config.errors import ConfigError
from vae_dist.data.loader import EvaluationBatch
from vae_dist.data.reader import SkippedSample
from vae_dist.distributed import Runtime
from vae_dist.evaluation.metrics import (
    EvaluatedBatch,
    Inputs,
    LadderSums,
    LatentReport,
    LatentSums,
    Metric,
    Sums,
    mean_and_error,
)
from vae_dist.files import read_json
from vae_dist.models.latent import LatentMoments
from vae_dist.models.vae import VAE
from vae_dist.randomness import draws
from vae_dist.training.compile import exact_float32
from vae_dist.training.memory import keep_freed_memory


class EvaluationResult(NamedTuple):
    """`figures`: means over `num_images` images by name, nats per image, `skipped_samples` that
    could not be read and count nowhere, and what the metrics measured. `bits_per_dim` is not there
    for float images and soft targets."""

    figures: dict[str, float]
    notes: dict[str, str]  # why a figure is missing, by its name
    latent: LatentReport
    statistics: dict[str, Any]  # of z, for models of latents

    def row(self) -> dict[str, float | list[float]]:
        """What a training run logs, as a row of metrics."""
        row = {f"eval/{name}": value for name, value in self.figures.items()}
        del row["eval/neg_elbo_se_nats"]
        latent = {name: value for name, value in self.latent._asdict().items() if value is not None}
        return row | {f"latent/{name}": value for name, value in latent.items()}


def evaluate(
    model: VAE,
    batches: Iterable[EvaluationBatch],
    *,
    runtime: Runtime,
    seed: int,
    metrics: Sequence[Metric] = (),
    max_skipped_fraction: float = 1.0,
    stop_requested: Callable[[], bool] | None = None,
) -> EvaluationResult | None:
    """Evaluate on every rank together; the result is the same on each.

    `model` is unwrapped, on `runtime.device`; it is put in eval mode meanwhile, its
    forward is float32. `stop_requested` is called before each `is_first` batch by every rank and
    must answer the same on each; after a True the result is None. Raises ConfigError when no image
    can be read, or more than `max_skipped_fraction` of them cannot.
    """
    bound, skipped = _Bound(model, runtime.device), list[SkippedSample]()
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if runtime.device.type == "cpu":
                keep_freed_memory()  # once the loader processes run
            if batch.is_first and stop_requested is not None and stop_requested():
                return None
            skipped += batch.skipped
            # what padding evaluates to, infinity included, must not count
            if (batch.weights > 0).any():
                evaluated = forward(model, batch, seed=seed, device=runtime.device)
                with exact_float32(), torch.inference_mode():
                    bound.update(evaluated)
                    for metric in metrics:
                        metric.update(evaluated)
    finally:
        model.train(was_training)
    num_skipped = sum(runtime.gather(len(skipped)))
    first = [str(sample) for of_rank in runtime.gather(skipped[:1]) for sample in of_rank]
    result = bound.result(runtime, num_skipped, max_skipped_fraction, "; ".join(first))
    for metric in metrics:
        report = metric.compute(runtime)
        result.figures.update(report.figures)
        result.notes.update(report.notes)
    return result


@torch.inference_mode()
def forward(
    model: VAE, batch: EvaluationBatch, *, seed: int, device: torch.device
) -> EvaluatedBatch:
    """The images that count, with one draw of z each, which belongs to the sample's number."""
    inputs = inputs_of(model, batch, seed=seed, device=device)
    shape = model.latent_shape(*inputs.image_size)
    noise = draws(torch.randn, seed, "eval-posterior", inputs.samples, shape).to(device)
    with exact_float32():
        output = model(inputs.images, noise, inputs.labels, inputs.mask)
    return EvaluatedBatch(model, inputs, noise, output)


def inputs_of(
    model: VAE,
    batch: EvaluationBatch,
    *,
    seed: int,
    device: torch.device,
    purpose: str = "eval-levels",
) -> Inputs:
    """The images that count, as the model takes them; noise belongs to the sample's number."""
    batch = batch.counted()
    levels, samples = batch.images.to(device), batch.samples.tolist()
    uniform = None
    if model.likelihood.needs_uniform:
        shape = tuple(levels.shape[1:])
        uniform = draws(torch.rand, seed, purpose, samples, shape).to(device)
    images = model.likelihood.prepare(levels, uniform)
    mask = None if batch.masks is None else batch.masks.to(device)
    return Inputs(levels, images, samples, batch.labels.to(device), mask)


class _Bound:
    """-ELBO and its parts, and what the latent is used for."""

    def __init__(self, model: VAE, device: torch.device) -> None:
        self._likelihood, units = model.likelihood, model.latent_channels
        self._sums = Sums(device, "distortion", "rate", "square", "dims")
        self._latents = LadderSums(device) if model.num_levels else LatentSums(units, device)
        self._moments = LatentMoments(units, device)

    def update(self, batch: EvaluatedBatch) -> None:
        output = batch.output
        distortion, rate = -output.log_likelihood.double(), output.kl.double().sum(1)
        self._sums.add(
            distortion=distortion,
            rate=rate,
            square=(distortion + rate).square(),
            dims=batch.inputs.dims,
        )
        self._latents.update(output, batch.inputs.samples)
        self._moments.add(output.mean, output.log_variance)

    def result(
        self, runtime: Runtime, num_skipped: int, max_skipped_fraction: float, first: str
    ) -> EvaluationResult:
        sums = self._sums.over_ranks(runtime)
        total, num_images = sums["distortion"] + sums["rate"], int(sums["images"])
        of_all = num_images + num_skipped
        if num_images == 0 or num_skipped > max_skipped_fraction * of_all:
            raise ConfigError(
                f"{num_skipped} of {of_all} images to evaluate on cannot be read "
                f"(max_skipped_fraction={max_skipped_fraction:g}); repair the shards, or raise the "
                f"limit. The first: {first or 'none was there'}"
            )
        mean, error = mean_and_error(total, sums["square"], num_images)
        figures = {
            "neg_elbo_nats": mean,
            "neg_elbo_se_nats": error,
            "rate_nats": sums["rate"] / num_images,
            "distortion_nats": sums["distortion"] / num_images,
            "bits_per_dim": self._likelihood.bits_per_dim(total, int(sums["dims"])),
            "num_images": num_images,
            "skipped_samples": num_skipped,
        }
        self._moments.sums = runtime.sum_over_ranks(self._moments.sums)
        return EvaluationResult(
            figures={name: value for name, value in figures.items() if value is not None},
            notes={},
            latent=self._latents.compute(runtime),
            statistics=self._moments.statistics(),
        )


# results.json: figures of one model on the same images, from one call or several

SAME = ("step", "weights", "weights_digest", "data_fingerprint", "seed", "mask")
COUNTS = ("num_images", "skipped_samples")
PARTS = ("figures", "conditions", "notes", "metric_weights")


def merged_with_earlier(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`record` and what the file at `path` has beyond it, if that is of the same evaluation."""
    merged, figures = dict(record), record["figures"]
    try:
        earlier = read_json(path, 2**24)
        is_same = all(earlier[key] == record[key] for key in SAME)
        if is_same and all(earlier["figures"][key] == figures[key] for key in COUNTS):
            for part in PARTS:
                kept = {key: v for key, v in earlier[part].items() if key not in figures}
                merged[part] = kept | record[part]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return dict(record)
    return merged


def as_json(record: Mapping[str, Any]) -> bytes:
    """NaN and infinities, which JSON has no word for, become null."""
    finite = json.loads(json.dumps(record), parse_constant=lambda constant: None)
    return (json.dumps(finite, indent=1) + "\n").encode()
