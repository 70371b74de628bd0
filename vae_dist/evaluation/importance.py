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
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vae_dist.distributed import Runtime
from vae_dist.evaluation.meter import Inputs, Report, Seen, mean_and_error
from vae_dist.models import posterior
from vae_dist.models.streamed_weights import StreamedWeights
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator

FEW = 3  # effective samples of an image, on average
BLOCK = 50  # draws of one image that come from one generator
# Latents x image dims of a decoder forward when chunk=0. On a CPU what its caches hold: for digits
# 334 latents, with one thread as fast as any number, and twice as fast as 4,000 in a wider network.
CPU_CHUNK_DIMS = 2**18
ACCELERATOR_CHUNK_DIMS = 2**23


class LatentPrior(Protocol):
    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats for latents (N, *latent), float64 (N,)."""


class Evidence(NamedTuple):
    """Of n images under P priors, float64 (P, n)."""

    log_evidence: Tensor
    effective_samples: Tensor


def automatic_chunk(num_dims: int, device: torch.device) -> int:
    """Latents of one decoder forward for images of `num_dims` values."""
    room = CPU_CHUNK_DIMS if device.type == "cpu" else ACCELERATOR_CHUNK_DIMS
    return max(1, room // num_dims)


@torch.inference_mode()
def importance_evidence(
    model: VAE,
    inputs: Inputs,
    mean: Tensor,
    log_variance: Tensor,
    *,
    num_samples: int,
    seed: int,
    chunk: int = 0,
    priors: Mapping[str, LatentPrior],
) -> Evidence:
    """log p(x) under N(0, I), then under each of `priors`, from the same draws and decodings.

    `mean`, `log_variance` (b, *latent) of q(z|x); at most `chunk` latents per forward (0: what
    suits image and device).
    """
    chunk = chunk or automatic_chunk(inputs.images[0].numel(), inputs.images.device)
    parts = []
    together = max(1, chunk // min(BLOCK, num_samples))  # images of one forward
    for first in range(0, len(inputs.images), together):
        part = slice(first, first + together)
        streamed = StreamedWeights(
            1 + len(priors), len(inputs.samples[part]), device=inputs.images.device
        )
        for block in range(-(-num_samples // BLOCK)):
            draws = min(BLOCK, num_samples - block * BLOCK)
            noise = _block(seed, inputs.samples[part], block, tuple(mean.shape[1:]))[:, :draws]
            for share in noise.split(max(1, min(chunk, draws)), dim=1):
                streamed.add(
                    _log_weights(model, inputs, part, mean[part], log_variance[part], share, priors)
                )
        parts.append((streamed.log_sum, streamed.effective_samples))
    log_sums, effective = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    return Evidence(log_sums - math.log(num_samples), effective)


def _block(seed: int, samples: list[int], block: int, latent: tuple[int, ...]) -> Tensor:
    """Draws block * BLOCK, ... of each image, float32 (n, BLOCK, *latent) on CPU, always whole:
    a shorter draw would not begin as a longer one does."""
    return torch.stack(
        [
            torch.randn(
                (BLOCK, *latent), generator=torch_generator(seed, "eval-importance", sample, block)
            )
            for sample in samples
        ]
    )


def _log_weights(
    model: VAE,
    inputs: Inputs,
    part: slice,
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor,
    priors: Mapping[str, LatentPrior],
) -> Tensor:
    """log w of noise (n, s, *latent) for the images `part` of the inputs, float64 (P, n, s)."""
    shape = noise.shape[:2]  # (n, s)

    def of_each(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[part].repeat_interleave(shape[1], 0)

    images = inputs.images[part].repeat_interleave(shape[1], 0)
    noise = noise.to(mean.device, non_blocking=True)
    z = posterior.sample(mean.unsqueeze(1), log_variance.unsqueeze(1), noise).flatten(0, 1)
    params = model.decode(z, inputs.image_size, of_each(inputs.labels))  # (n s, ...)
    log_likelihood = model.likelihood.log_prob(params, images, of_each(inputs.mask)).double()
    noise, log_variance = noise.flatten(2).double(), log_variance.flatten(1).double()
    # both without the d/2 log 2 pi that cancels between N(0, I) and q
    log_q = -0.5 * (noise.square().sum(2) + log_variance.sum(1, keepdim=True))  # (n, s)
    constant = 0.5 * noise.shape[2] * math.log(2 * math.pi)
    log_priors = [-0.5 * z.flatten(1).double().square().sum(1)]
    log_priors += [prior.log_prob(z) + constant for prior in priors.values()]
    joint = torch.stack([log_likelihood + log_prior for log_prior in log_priors])
    return joint.unflatten(1, shape) - log_q


class ImportanceMeter:
    """`is_nll_nats` and its company, for N(0, I) and, with their names in it, for other priors."""

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
        # of each prior: nll, its square, effective samples, variance by the draws
        self._sums = torch.zeros(1 + len(self._priors), 4, dtype=torch.float64, device=device)
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)  # images, dims

    def add(self, seen: Seen) -> None:
        evidence = importance_evidence(
            self._model,
            seen.inputs,
            seen.output.mean,
            seen.output.log_variance,
            num_samples=self._num_samples,
            seed=self._seed,
            chunk=self._chunk,
            priors=self._priors,
        )
        nll, effective = -evidence.log_evidence, evidence.effective_samples
        variance = 1 / effective - 1 / self._num_samples
        self._sums += torch.stack([nll, nll.square(), effective, variance], 1).sum(2)
        dims = seen.inputs.dims
        self._counts += torch.stack([torch.ones_like(dims), dims]).sum(1)

    def report(self, runtime: Runtime) -> Report:
        sums = runtime.sum_over_ranks(self._sums).tolist()
        num_images, num_dims = runtime.sum_over_ranks(self._counts).tolist()
        report = Report()
        for name, (nll, square, effective, variance) in zip(
            ["", *(f"_{name}" for name in self._priors)], sums, strict=True
        ):
            mean, error = mean_and_error(nll, square, num_images)
            report.figures.update(
                {
                    f"is_nll{name}_nats": mean,
                    f"is_nll{name}_se_nats": error,
                    f"is_nll{name}_draws_se_nats": max(0.0, variance) ** 0.5 / num_images,
                    f"is_effective_samples{name}": effective / num_images,
                }
            )
            bits = self._model.likelihood.bits_per_dim(nll, int(num_dims))
            if bits is not None:
                report.figures[f"is_bits_per_dim{name}"] = bits
            if effective / num_images < min(FEW, self._num_samples / 2):
                report.notes[f"is_nll{name}_nats"] = (
                    f"is_nll{name}_nats rests on {effective / num_images:.1f} effective samples of "
                    f"{self._num_samples}: it is an upper bound more than a value; raise samples"
                )
        return report
