"""The evidence log p(x) by importance sampling with q(z|x) as proposal (Burda et al. 2016, sec. 5).

    log p(x) ~ log 1/K sum_k w_k,   w_k = p(x|z_k) p(z_k) / q(z_k|x),   z_k ~ q(z|x)

-log of it is at most -ELBO on average, falls with K and tends to -log p(x). The encoder has run
already; the decoder runs on at most `chunk` latents at once, and the sum over k is streamed in
float64, so K is bounded by time alone. Draws come in blocks: block j of image i is a function of
(seed, i, j), so neither ranks nor batch nor chunk nor K change the first K draws.

The effective sample size (sum w)^2 / sum w^2 says how many of the K draws the sum rests on: near 1,
the proposal misses and the estimate is a bound rather than a value. 1/ess - 1/K is the variance
that the draws bring into log p(x) of an image.

Legend: n images, s draws of each, P priors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from vae_dist.distributed import Runtime
from vae_dist.evaluation.metrics import EvaluatedBatch, Inputs, Report, Sums, mean_and_error
from vae_dist.models.latent import LatentPrior, sample_posterior
from vae_dist.models.vae import VAE, each
from vae_dist.randomness import draws

FEW = 3  # effective samples of an image, on average
BLOCK = 50  # draws of one image that come from one generator
# Latents x image dims of a decoder forward when chunk=0. On a CPU what its caches hold: for digits
# 334 latents, with one thread as fast as any number, and twice as fast as 4,000 in a wider network.
CPU_CHUNK_DIMS = 2**18
ACCELERATOR_CHUNK_DIMS = 2**23


class StreamedWeights:
    """Sums of importance weights w that come in parts, as logarithms of any size, in float64: of
    w / exp(largest log w so far), which can neither overflow nor vanish."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        self._largest = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        self.sum = torch.zeros(shape, dtype=torch.float64, device=device)  # over exp(shift)
        self._squares = torch.zeros_like(self.sum)

    def add(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of log_weights (*shape, s): the weights over exp(shift), at most 1, and what earlier sums
        (*shape) are multiplied by to be over exp(shift) too."""
        log_weights = log_weights.double()
        largest = torch.maximum(self._largest, log_weights.amax(-1))
        # Where all weights so far are 0 any shift will do, but -inf - -inf is no number.
        shift = torch.where(largest == -torch.inf, 0.0, largest)
        weights, shrink = (log_weights - shift.unsqueeze(-1)).exp(), (self._largest - shift).exp()
        self.sum = self.sum * shrink + weights.sum(-1)
        self._squares = self._squares * shrink.square() + weights.square().sum(-1)
        self._largest = largest
        return weights, shrink

    @property
    def log_sum(self) -> Tensor:
        return self._largest + self.sum.log()

    @property
    def effective_samples(self) -> Tensor:
        """(sum w)^2 / sum w^2; 0 where all weights are."""
        return torch.where(self.sum > 0, self.sum.square() / self._squares, 0.0)


def weighted_draws(
    model: VAE,
    images: Tensor,
    noise: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    priors: Sequence[LatentPrior] = (),
) -> tuple[Tensor, Tensor]:
    """Decoder outputs (n s, ...) of z from noise (n, s, *latent), and log w (P, n, s), float64,
    under N(0, I), then under each other prior; `mean`, `log_variance` (n, *latent) of q(z|x),
    images, labels and mask of each image."""
    shape = noise.shape[:2]  # (n, s)
    noise = noise.to(mean.device, non_blocking=True)
    if model.num_levels:  # moments of a group depend on the draws above it
        output = model(images, noise, labels, mask)
        log_weights = output.log_likelihood.double() - output.log_ratio.double()
        return output.params.flatten(0, 1), log_weights.unsqueeze(0)
    z = sample_posterior(mean, log_variance, noise).flatten(0, 1)
    height, width = images.shape[-2:]
    params = model.decode(z, (height, width), each(labels, shape[1]))
    images, mask = each(images, shape[1]), each(mask, shape[1])
    log_likelihood = model.likelihood.log_prob(params, images, mask).double()
    noise, log_variance = noise.flatten(2).double(), log_variance.flatten(1).double()
    # both without the d/2 log 2 pi that cancels between N(0, I) and q
    log_q = -0.5 * (noise.square().sum(2) + log_variance.sum(1, keepdim=True))  # (n, s)
    constant = 0.5 * noise.shape[2] * math.log(2 * math.pi)
    log_priors = [-0.5 * z.flatten(1).double().square().sum(1)]
    log_priors += [prior.log_prob(z) + constant for prior in priors]
    log_joint = torch.stack([log_likelihood + log_prior for log_prior in log_priors])
    return params, log_joint.unflatten(1, shape) - log_q


class ImportanceMetric:
    """`is_nll_nats` and its company, for N(0, I) and, with their names in it, for other priors.

    `num_samples`: K. At most `chunk` latents per forward (0: what suits image and device).
    """

    def __init__(
        self,
        model: VAE,
        device: torch.device,
        *,
        num_samples: int,
        seed: int,
        chunk: int = 0,
        priors: Mapping[str, LatentPrior] | None = None,
    ) -> None:
        self._model, self._priors = model, dict(priors or {})
        self._num_samples, self._seed, self._chunk = num_samples, seed, chunk
        names = ("nll", "square", "effective", "variance", "dims")
        self._sums = {
            name: Sums(device, *names) for name in ["", *(f"_{name}" for name in self._priors)]
        }

    def update(self, batch: EvaluatedBatch) -> None:
        output, dims = batch.output, batch.inputs.dims
        evidence = self.evidence(batch.inputs, output.mean, output.log_variance)
        for sums, log_evidence, effective in zip(self._sums.values(), *evidence, strict=True):
            sums.add(
                nll=-log_evidence,
                square=log_evidence.square(),
                effective=effective,
                variance=1 / effective - 1 / self._num_samples,
                dims=dims,
            )

    @torch.inference_mode()
    def evidence(self, inputs: Inputs, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x) and effective samples of each image, float64 (P, b), under N(0, I) and then each
        other prior, from the same draws and decodings; mean, log_variance (b, *latent) of q(z|x).
        """
        per_forward = CPU_CHUNK_DIMS if mean.device.type == "cpu" else ACCELERATOR_CHUNK_DIMS
        chunk = self._chunk or max(1, per_forward // inputs.images[0].numel())
        images_at_once = max(1, chunk // min(BLOCK, self._num_samples))
        parts = []
        for first in range(0, len(inputs.images), images_at_once):
            part = slice(first, first + images_at_once)
            shape = (len(self._sums), len(inputs.samples[part]))
            streamed = StreamedWeights(*shape, device=mean.device)
            for noise in self._noise(inputs.samples[part], mean.shape[1:]):
                for share in noise.split(max(1, min(chunk, noise.shape[1])), dim=1):
                    _, log_weights = weighted_draws(
                        self._model,
                        inputs.images[part],
                        share,
                        mean[part],
                        log_variance[part],
                        labels=None if inputs.labels is None else inputs.labels[part],
                        mask=None if inputs.mask is None else inputs.mask[part],
                        priors=list(self._priors.values()),
                    )
                    streamed.add(log_weights)
            parts.append((streamed.log_sum, streamed.effective_samples))
        log_sums, effective = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        return log_sums - math.log(self._num_samples), effective

    def _noise(self, samples: Sequence[int], latent_shape: Sequence[int]) -> Iterator[Tensor]:
        """The K draws of each image in blocks, float32 (n, up to BLOCK, *latent) on CPU."""
        for block, first in enumerate(range(0, self._num_samples, BLOCK)):
            shape = BLOCK, *latent_shape  # whole: a shorter draw would not begin as a longer one
            noise = draws(torch.randn, self._seed, "eval-importance", samples, shape, block)
            yield noise[:, : self._num_samples - first]

    def compute(self, runtime: Runtime) -> Report:
        report = Report()
        for name, named_sums in self._sums.items():
            sums = named_sums.over_ranks(runtime)
            num_images, figure = sums["images"], f"is_nll{name}_nats"
            mean, error = mean_and_error(sums["nll"], sums["square"], num_images)
            effective = sums["effective"] / num_images
            report.figures[figure] = mean
            report.figures[f"is_nll{name}_se_nats"] = error
            spread = max(0.0, sums["variance"]) ** 0.5
            report.figures[f"is_nll{name}_draws_se_nats"] = spread / num_images
            report.figures[f"is_effective_samples{name}"] = effective
            bits = self._model.likelihood.bits_per_dim(sums["nll"], int(sums["dims"]))
            if bits is not None:
                report.figures[f"is_bits_per_dim{name}"] = bits
            if effective < min(FEW, self._num_samples / 2):
                report.notes[figure] = (
                    f"{figure} rests on {effective:.1f} effective samples of {self._num_samples}: "
                    "it is an upper bound more than a value; raise samples"
                )
        return report
