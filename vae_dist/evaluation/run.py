"""The figures of a model on a data set, each image once over all ranks.

What goes in: a VAE and this rank's evaluation batches, each of one shape. What comes out: means
over all images of

    -ELBO = distortion + rate,   distortion = -log p(x|z),   rate = KL(q(z|x) || p(z)),   z ~ q

in nats per image (beta = 1), and bits per dim = (-ELBO of all images as nats of 8-bit levels) /
(values of all images x ln 2), so that images of different shapes mix; then what the meters say that
are passed along. Encoder and decoder run once per image, and meters share what they made.
The draws belong to the sample's number, so they are the same at every evaluation; sums are float64.
The figures are therefore equal for any number of ranks and any batch size to 1e-5.

Legend: b images of a rank's batch, C H W an image, D = C H W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from vae_dist.config.errors import ConfigError
from vae_dist.data.loader import EvaluationBatch
from vae_dist.distributed import Runtime
from vae_dist.evaluation.latents import LatentReport, LatentSums
from vae_dist.evaluation.meter import Inputs, Meter, Report, Seen, mean_and_error
from vae_dist.models.latent_moments import LatentStatistics
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
    measured: dict[str, float] = field(default_factory=dict)  # by the meters
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
    meters: Sequence[Meter] = (),
    stop_requested: Callable[[], bool] | None = None,
) -> EvaluationResult | None:
    """Evaluate on every rank together; the result is the same on each.

    `model` is unwrapped, on `runtime.device`; it is put in eval mode meanwhile, its
    forward is float32. `stop_requested` is called before each `is_first` batch by every rank and
    must answer the same on each; after a True the result is None. Raises ConfigError when no image
    can be read.
    """
    bound = _Bound(model, runtime.device)
    skipped = torch.zeros((), dtype=torch.float64, device=runtime.device)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if batch.is_first and stop_requested is not None and stop_requested():
                return None
            skipped += len(batch.skipped)
            # what padding evaluates to, infinity included, must not count
            if (batch.weights > 0).any():
                _measure(model, batch, [bound, *meters], seed=seed, device=runtime.device)
    finally:
        model.train(was_training)
    num_skipped = int(runtime.sum_over_ranks(skipped).item())
    result = bound.result(runtime, num_skipped)
    reports: list[Report] = [meter.report(runtime) for meter in meters]
    for report in reports:
        result.measured.update(report.figures)
        result.notes.update(report.notes)
    return result


@torch.inference_mode()
def _measure(
    model: VAE,
    batch: EvaluationBatch,
    meters: Sequence[_Bound | Meter],
    *,
    seed: int,
    device: torch.device,
) -> None:
    inputs = _inputs(model, batch, seed=seed, device=device)
    shape = model.latent_shape(*inputs.image_size)
    noise = draws(torch.randn, seed, "eval-posterior", inputs.samples, shape).to(device)
    with exact_float32(device):
        seen = Seen(model, inputs, noise, model(inputs.images, noise, inputs.labels, inputs.mask))
        for meter in meters:
            meter.add(seen)


def _inputs(model: VAE, batch: EvaluationBatch, *, seed: int, device: torch.device) -> Inputs:
    """The images that count, as the model takes them."""
    counts = batch.weights > 0
    levels = batch.images[counts].to(device)  # (b, C, H, W)
    samples = batch.samples[counts].tolist()
    uniform = None
    if model.likelihood.needs_uniform:
        shape = tuple(levels.shape[1:])
        uniform = draws(torch.rand, seed, "eval-levels", samples, shape).to(device)
    images = model.likelihood.prepare(levels, uniform)
    mask = None if batch.masks is None else batch.masks[counts].to(device)
    return Inputs(levels, images, samples, batch.labels[counts].to(device), mask)


class _Bound:
    """-ELBO and its parts, and what the latent is used for."""

    def __init__(self, model: VAE, device: torch.device) -> None:
        self._model = model
        # distortion, rate, square of their sum, fraction at the floor, images that have a floor,
        # images, dims
        self._sums = torch.zeros(7, dtype=torch.float64, device=device)
        self._latents = LatentSums(model, device)

    def add(self, seen: Seen) -> None:
        output = seen.output
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
            seen.inputs.dims,
        ]
        self._sums += torch.stack(per_image).sum(1)
        self._latents.add(output.mean, output.log_variance, z=output.z, samples=seen.inputs.samples)

    def result(self, runtime: Runtime, num_skipped: int) -> EvaluationResult:
        sums = runtime.sum_over_ranks(self._sums).tolist()
        latent = self._latents.report(runtime)
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
