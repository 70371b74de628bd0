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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_dist.config.errors import ConfigError
from vae_dist.data.evaluation import EvaluationBatch
from vae_dist.distributed import Runtime
from vae_dist.evaluation.metrics import (
    EvaluatedBatch,
    Inputs,
    LatentReport,
    LatentSums,
    Metric,
    mean_and_error,
)
from vae_dist.models.latent import LatentStatistics
from vae_dist.models.likelihoods import Likelihood
from vae_dist.models.vae import VAE
from vae_dist.randomness import draws
from vae_dist.training.compile import exact_float32


@dataclass(frozen=True)
class EvaluationResult:
    """Means over `num_images` images; nats are per image."""

    neg_elbo_nats: float
    neg_elbo_se_nats: float  # standard error of that mean, over images
    rate_nats: float
    distortion_nats: float
    bits_per_dim: float | None  # None: float images, soft targets
    num_images: int
    skipped_samples: int  # images that could not be read and count nowhere
    variance_at_floor_fraction: float | None  # part of all values; None: no learned variance
    latent: LatentReport
    statistics: LatentStatistics  # of z, for models of latents
    measured: dict[str, float] = field(default_factory=dict)  # by the metrics
    notes: dict[str, str] = field(default_factory=dict)  # why a figure is missing, by its name

    def figures(self) -> dict[str, float]:
        """What there is, by name, the latent's apart."""
        values = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.name not in ("latent", "statistics", "measured", "notes")
        }
        values = {name: value for name, value in values.items() if value is not None}
        return values | self.measured

    def row(self) -> dict[str, float | list[float]]:
        """What a training run logs, as a row of metrics."""
        return {
            f"eval/{name}": value
            for name, value in self.figures().items()
            if name != "neg_elbo_se_nats"
        } | {
            f"latent/{entry.name}": getattr(self.latent, entry.name)
            for entry in fields(self.latent)
        }


def evaluate(
    model: VAE,
    batches: Iterable[EvaluationBatch],
    *,
    runtime: Runtime,
    seed: int,
    metrics: Sequence[Metric] = (),
    stop_requested: Callable[[], bool] | None = None,
) -> EvaluationResult | None:
    """Evaluate on every rank together; the result is the same on each.

    `model` is unwrapped, on `runtime.device`; it is put in eval mode meanwhile, its
    forward is float32. `stop_requested` is called before each `is_first` batch by every rank and
    must answer the same on each; after a True the result is None. Raises ConfigError when no image
    can be read.
    """
    bound = _Bound(model, runtime.device)
    # images that could not be read, and that have missing pixels
    counts = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if batch.is_first and stop_requested is not None and stop_requested():
                return None
            counts[0] += len(batch.skipped)
            # what padding evaluates to, infinity included, must not count
            if (batch.weights > 0).any():
                evaluated = _forward(model, batch, seed=seed, device=runtime.device)
                counts[1] += 0 if batch.masks is None else len(evaluated.inputs.samples)
                with exact_float32(runtime.device), torch.inference_mode():
                    bound.update(evaluated)
                    for metric in metrics:
                        if batch.masks is None or not metric.of_whole_images:
                            metric.update(evaluated)
    finally:
        model.train(was_training)
    num_skipped, num_incomplete = runtime.sum_over_ranks(counts).tolist()
    result = bound.result(runtime, int(num_skipped))
    for metric in metrics:
        if num_incomplete and metric.of_whole_images:
            reason = "compares whole images, and data.mask says that pixels are missing"
            result.notes.update({name: f"{name} {reason}" for name in metric.of_whole_images})
            continue
        report = metric.compute(runtime)
        result.measured.update(report.figures)
        result.notes.update(report.notes)
    return result


@torch.inference_mode()
def _forward(
    model: VAE, batch: EvaluationBatch, *, seed: int, device: torch.device
) -> EvaluatedBatch:
    inputs = inputs_of(model, batch, seed=seed, device=device)
    shape = model.latent_shape(*inputs.image_size)
    noise = draws(torch.randn, seed, "eval-posterior", inputs.samples, shape).to(device)
    with exact_float32(device):
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
    """The images that count, as the model takes them."""
    counts = batch.weights > 0
    levels = batch.images[counts].to(device)  # (b, C, H, W)
    samples = batch.samples[counts].tolist()
    images = with_noise(model.likelihood, levels, samples, seed=seed, purpose=purpose)
    mask = None if batch.masks is None else batch.masks[counts].to(device)
    return Inputs(levels, images, samples, batch.labels[counts].to(device), mask)


def with_noise(
    likelihood: Likelihood,
    stored: Tensor,
    samples: Sequence[int],
    *,
    seed: int,
    purpose: str = "eval-levels",
) -> Tensor:
    """Stored images (b, C, H, W) as `prepare` makes them; noise belongs to the sample's number."""
    uniform = None
    if likelihood.needs_uniform:
        shape = tuple(stored.shape[1:])
        uniform = draws(torch.rand, seed, purpose, samples, shape).to(stored.device)
    return likelihood.prepare(stored, uniform)


class _Bound:
    """-ELBO and its parts, and what the latent is used for."""

    def __init__(self, model: VAE, device: torch.device) -> None:
        self._model = model
        # distortion, rate, square of their sum, fraction at the floor, images that have a floor,
        # images, dims
        self._sums = torch.zeros(7, dtype=torch.float64, device=device)
        self._latents = LatentSums(model, device)

    def update(self, batch: EvaluatedBatch) -> None:
        output = batch.output
        distortion, rate = -output.log_likelihood.double(), output.kl.double().sum(1)
        one = torch.ones_like(distortion)
        at_floor = self._model.likelihood.at_floor_fraction(output.params)
        per_image: list[Tensor] = [
            distortion,
            rate,
            (distortion + rate).square(),
            0 * one if at_floor is None else at_floor.double(),
            0 * one if at_floor is None else one,
            one,
            batch.inputs.dims,
        ]
        self._sums += torch.stack(per_image).sum(1)
        self._latents.update(
            output.mean, output.log_variance, z=output.z, samples=batch.inputs.samples
        )

    def result(self, runtime: Runtime, num_skipped: int) -> EvaluationResult:
        sums = runtime.sum_over_ranks(self._sums).tolist()
        latent = self._latents.compute(runtime)
        distortion, rate, squares, at_floor, num_with_floor, num_images, num_dims = sums
        if num_images == 0:
            raise ConfigError(
                f"there is no image to evaluate on ({num_skipped} could not be read); "
                "look at the shards of data.validation"
            )
        neg_elbo, error = mean_and_error(distortion + rate, squares, num_images)
        return EvaluationResult(
            neg_elbo_nats=neg_elbo,
            neg_elbo_se_nats=error,
            rate_nats=rate / num_images,
            distortion_nats=distortion / num_images,
            bits_per_dim=self._model.likelihood.bits_per_dim(distortion + rate, int(num_dims)),
            num_images=int(num_images),
            skipped_samples=num_skipped,
            variance_at_floor_fraction=at_floor / num_with_floor if num_with_floor else None,
            latent=latent,
            statistics=self._latents.statistics(runtime),
        )


# results.json: figures of one model on the same images, from one call or several

SAME = ("step", "weights", "weights_digest", "data_fingerprint", "seed", "precision", "mask")
COUNTS = ("num_images", "skipped_samples")


def conditions_of(
    figures: Iterable[str], *, importance_samples: int, prior: str
) -> dict[str, dict[str, Any]]:
    """By figure: how many draws it rests on, and which prior, where it is of any."""
    found: dict[str, dict[str, Any]] = {}
    for name in figures:
        if name.startswith("is_"):
            found.setdefault(name, {})["importance_samples"] = importance_samples
        if "gmm" in name:
            found.setdefault(name, {})["prior"] = prior
    return found


def merged_with_earlier(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`record` and what the file at `path` has beyond it, if that is of the same evaluation."""
    figures = record["figures"]
    try:
        earlier = dict(json.loads(path.read_bytes()))
        before, conditions, notes, weights = (
            dict(earlier[key]) for key in ("figures", "conditions", "notes", "metric_weights")
        )
        is_same = all(earlier[key] == record[key] for key in SAME)
        is_same &= all(before[key] == figures[key] for key in COUNTS)
    except (OSError, ValueError, KeyError, TypeError):
        is_same = False
    if not is_same:
        return dict(record)

    def beyond(values: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in now}

    return {
        **record,
        "figures": {**figures, **beyond(before, figures)},
        "conditions": {**record["conditions"], **beyond(conditions, figures)},
        "notes": {**record["notes"], **beyond(notes, {**figures, **record["notes"]})},
        "metric_weights": {**weights, **record["metric_weights"]},
    }


def as_json(record: Mapping[str, Any]) -> bytes:
    """NaN and infinities, which JSON has no word for, become null."""
    finite = json.loads(json.dumps(record), parse_constant=lambda constant: None)
    return (json.dumps(finite, indent=1) + "\n").encode()
