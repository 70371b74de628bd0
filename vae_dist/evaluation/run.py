"""The ELBO of a model on a data set, each image once over all ranks.

What goes in: a VAE and this rank's evaluation batches. What comes out: means over all images of

    -ELBO = distortion + rate,   distortion = -log p(x|z),   rate = KL(q(z|x) || p(z)),   z ~ q

in nats per image (beta = 1), and bits per dim = (-ELBO as nats of 8-bit levels) / (C H W ln 2).
The draws belong to the sample's number, so they are the same at every evaluation; sums are float64.
The figures are therefore equal for any number of ranks and any batch size to 1e-5.

Legend: b images of a rank's batch, C H W an image, D = C H W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vae_dist.config.errors import ConfigError
from vae_dist.data.stream import EvaluationBatch
from vae_dist.evaluation.latents import LatentReport, LatentSums
from vae_dist.models.likelihoods import bits_per_dim
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator
from vae_dist.runtime import Runtime


@dataclass(frozen=True)
class EvaluationResult:
    """Means over `num_images` images; nats are per image."""

    neg_elbo_nats: float
    rate_nats: float
    distortion_nats: float
    bits_per_dim: float
    num_images: int
    skipped_samples: int  # images that could not be read and count nowhere
    variance_at_floor_fraction: float | None  # part of all values; None: no learned variance
    latent: LatentReport

    def figures(self) -> dict[str, float]:
        """What there is, by name, the latent's apart."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["latent"]
        return {name: value for name, value in values.items() if value is not None}

    def row(self) -> dict[str, float | list[float]]:
        """All of it as a row of metrics."""
        return {f"eval/{name}": value for name, value in self.figures().items()} | {
            f"latent/{field.name}": getattr(self.latent, field.name)
            for field in fields(self.latent)
        }


def evaluate(
    model: VAE,
    batches: Iterable[EvaluationBatch],
    *,
    runtime: Runtime,
    seed: int,
    stop_requested: Callable[[], bool] | None = None,
) -> EvaluationResult | None:
    """Evaluate on every rank together; the result is the same on each.

    `model` is unwrapped, on `runtime.device`; it is put in eval mode meanwhile, its
    forward is float32. `stop_requested` is called before each batch by every rank and must answer
    the same on each; after a True the result is None. Raises ConfigError when no image can be read.
    """
    sums = torch.zeros(6, dtype=torch.float64, device=runtime.device)
    latents = LatentSums(model, runtime.device)
    num_dims = 0
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if stop_requested is not None and stop_requested():
                return None
            num_dims = batch.images[0].numel()
            sums += _sums(model, batch, latents, seed=seed, device=runtime.device)
    finally:
        model.train(was_training)
    sums = runtime.sum_over_ranks(sums)
    return _result(model, sums, latents.report(runtime), num_dims)


@torch.inference_mode()
def _sums(
    model: VAE, batch: EvaluationBatch, latents: LatentSums, *, seed: int, device: torch.device
) -> Tensor:
    """Adds a batch to `latents`. Its sums, float64 (6,): distortion, rate, fraction at the floor,
    images that have a floor, images, and what was skipped."""
    images_u8 = batch.images.to(device)  # (b, C, H, W)
    samples = batch.samples.tolist()
    height, width = images_u8.shape[-2:]
    noise = _draws(torch.randn, seed, "eval-posterior", samples, model.latent_shape(height, width))
    uniform = None
    if model.likelihood.needs_uniform:
        shape = tuple(images_u8.shape[1:])
        uniform = _draws(torch.rand, seed, "eval-levels", samples, shape).to(device)
    output = model(model.likelihood.prepare(images_u8, uniform), noise.to(device))
    at_floor = model.likelihood.at_floor_fraction(output.params)
    one = torch.ones_like(output.log_likelihood)
    per_image = torch.stack(
        [
            -output.log_likelihood,
            output.kl.sum(1),
            0 * one if at_floor is None else at_floor,
            0 * one if at_floor is None else one,
            one,
        ]
    ).double()  # (5, b)
    # where, not a product: what padding evaluates to, infinity included, must not count
    counts = batch.weights.to(device) > 0
    sums = torch.where(counts, per_image, 0.0).sum(1)
    latents.add(output.mean[counts], output.log_variance[counts])
    return torch.cat([sums, sums.new_tensor([len(batch.skipped)])])


def _draws(
    draw: Callable[..., Tensor], seed: int, purpose: str, samples: list[int], shape: tuple[int, ...]
) -> Tensor:
    """One draw per sample number, float32 (b, *shape), made on CPU so that devices agree."""
    return torch.stack(
        [
            draw(shape, generator=torch_generator(seed, purpose, max(0, sample)))
            for sample in samples
        ]
    )


def _result(model: VAE, sums: Tensor, latent: LatentReport, num_dims: int) -> EvaluationResult:
    distortion, rate, at_floor, num_with_floor, num_images, num_skipped = sums.tolist()
    if num_images == 0:
        raise ConfigError(
            f"there is no image to evaluate on ({num_skipped:.0f} could not be read); "
            "look at the shards of data.validation"
        )
    distortion, rate = distortion / num_images, rate / num_images
    level_nats = model.likelihood.nats_to_level_nats(distortion + rate, num_dims=num_dims)
    return EvaluationResult(
        neg_elbo_nats=distortion + rate,
        rate_nats=rate,
        distortion_nats=distortion,
        bits_per_dim=bits_per_dim(level_nats, num_dims=num_dims),
        num_images=int(num_images),
        skipped_samples=int(num_skipped),
        variance_at_floor_fraction=at_floor / num_with_floor if num_with_floor else None,
        latent=latent,
    )
