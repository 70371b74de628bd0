"""Missing pixels of images, filled by a trained model: E[x_missing | x_observed] and draws of it.

In: images as `prepare` made them, float32 (n, C, H, W), and masks (n, 1, H, W), 1 where a pixel was
observed; what stands at the other ones is not looked at. With g(z) = E[x|z]:

    single       z ~ q(z|x_obs);  mean = g(z) of the first draw
    importance   z_k ~ q(z|x_obs), k = 1 ... K;  mean = sum_k w_k g(z_k) / sum_k w_k,
                 w_k = p(x_obs|z_k) p(z_k) / q(z_k|x_obs);  a draw is g(z_k) with probability
                 w_k / sum w                                (Mattei and Frellsen 2019)
    gibbs        chains x_missing -> z ~ q(z|x) -> x_missing ~ p(x|z), K steps;  mean of g(z) over
                 the later half of all chains; a draw is g(z) at a chain's end  (pseudo-Gibbs,
                 Rezende et al. 2014)

The standard deviation of a pixel is that of g(z) under the same weights: what is not known of z,
not the noise of p(x|z). The importance-weighted mean tends to E[x_missing | x_obs] of the model for
any q; the other two are as good as q is. K costs time, not memory: sums over k are streamed. Draws
of image i are functions of (seed, i), so neither batch nor chunk changes them.

Legend: n images, s latents of each, J draws, D = C H W.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.evaluation.importance import StreamedWeights, weighted_draws
from vae_dist.models.latent import sample_posterior
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator

BLOCK = 32  # draws of one image that come from one generator


class Incomplete(NamedTuple):
    """What is known of n images, on the model's device."""

    images: Tensor  # float32 (n, C, H, W) in [-1, 1]
    mask: Tensor  # (n, 1, H, W), 1: observed
    labels: Tensor  # int64 (n,), -1 where there is none
    samples: list[int]  # the number of each image, which its draws belong to

    def part(self, start: int, stop: int) -> Incomplete:
        part = slice(start, stop)
        return Incomplete(self.images[part], self.mask[part], self.labels[part], self.samples[part])


class Imputed(NamedTuple):
    """Values for every pixel, float32 in [-1, 1] on CPU; those of observed ones are the model's."""

    mean: Tensor  # (n, C, H, W)
    deviation: Tensor  # (n, C, H, W), standard deviation
    draws: Tensor  # (n, J, C, H, W)
    effective_samples: Tensor  # float64 (n,), (sum w)^2 / sum w^2


class _Moments:
    """Weighted mean, variance and draws of values that come in parts; log weights of any size."""

    def __init__(self, n: int, dims: int, num_draws: int, device: torch.device) -> None:
        self._weights = StreamedWeights(n, device=device)
        self._first, self._second = torch.zeros(2, n, dims, dtype=torch.float64, device=device)
        self._draws = torch.zeros(n, num_draws, dims, device=device)
        self._best = torch.full((n, num_draws), -torch.inf, dtype=torch.float64, device=device)

    def add(self, values: Tensor, log_weights: Tensor, gumbel: Tensor | None = None) -> None:
        """values (n, s, D), log_weights (n, s), gumbel (n, s, J): a draw is the value of the
        largest log weight + Gumbel noise, which makes its probability the normalised weight."""
        log_weights = log_weights.double()
        weights, shrink = self._weights.add(log_weights)
        for total, power in ((self._first, values), (self._second, values.square())):
            total *= shrink.unsqueeze(1)
            total += torch.einsum("ns,nsd->nd", weights.float(), power)
        if gumbel is not None:
            best, place = (log_weights.unsqueeze(2) + gumbel).max(1)  # (n, J)
            found = torch.gather(values, 1, place.unsqueeze(2).expand(-1, -1, values.shape[2]))
            is_better = best > self._best
            self._draws = torch.where(is_better.unsqueeze(2), found, self._draws)
            self._best = torch.where(is_better, best, self._best)

    def result(self, draws: Tensor | None, shape: tuple[int, ...]) -> Imputed:
        total = self._weights.sum.unsqueeze(1)
        mean = self._first / total
        deviation = (self._second / total - mean.square()).clamp(min=0).sqrt()
        values = self._draws if draws is None else draws
        return Imputed(
            mean.float().view(-1, *shape).cpu(),
            deviation.float().view(-1, *shape).cpu(),
            values.view(*values.shape[:2], *shape).cpu(),
            self._weights.effective_samples.cpu(),
        )


@torch.inference_mode()
def impute(
    model: VAE,
    incomplete: Incomplete,
    *,
    method: str,
    num_samples: int,
    num_draws: int,
    seed: int,
    chunk: int = 256,
) -> Imputed:
    """All images, by `method`; at most `chunk` latents are decoded at once. `num_samples` is K, of
    no meaning for `single`."""
    of_each = {"single": num_draws, "importance": min(BLOCK, num_samples), "gibbs": num_draws}
    together = max(1, chunk // of_each[method])  # images
    parts = []
    for start in range(0, len(incomplete.samples), together):
        part = incomplete.part(start, start + together)
        if method == "single":
            parts.append(_single(model, part, num_draws=num_draws, seed=seed))
        elif method == "importance":
            parts.append(_importance(model, part, num_samples, num_draws, seed=seed, chunk=chunk))
        else:
            parts.append(_gibbs(model, part, num_samples, num_draws, seed=seed))
    return Imputed(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _single(model: VAE, part: Incomplete, *, num_draws: int, seed: int) -> Imputed:
    mean, log_variance = model.encode(part.images, part.labels, part.mask)
    noise = _normal(seed, part.samples, 0, (num_draws, *mean.shape[1:])).to(mean.device)
    values = _decoded(model, part, sample_posterior(mean, log_variance, noise))[1]
    moments = _Moments(len(values), values.shape[2], 0, values.device)
    moments.add(values, torch.zeros(values.shape[:2], device=values.device))
    shape = tuple(part.images.shape[1:])
    imputed = moments.result(values, shape)
    one = torch.ones_like(imputed.effective_samples)
    return imputed._replace(mean=imputed.draws[:, 0], effective_samples=one)


def _importance(
    model: VAE, part: Incomplete, num_samples: int, num_draws: int, *, seed: int, chunk: int
) -> Imputed:
    mean, log_variance = model.encode(part.images, part.labels, part.mask)
    device, shape = mean.device, tuple(part.images.shape[1:])
    moments = _Moments(len(mean), part.images[0].numel(), num_draws, device)
    for noise, gumbel in _blocks(seed, part.samples, num_samples, num_draws, mean.shape[1:], chunk):
        params, (log_weights,) = weighted_draws(
            model, part.images, noise, mean, log_variance, labels=part.labels, mask=part.mask
        )
        values = model.likelihood.mean(params).flatten(1).view(*noise.shape[:2], -1)
        moments.add(values, log_weights, gumbel.to(device))
    return moments.result(None, shape)


def _gibbs(model: VAE, part: Incomplete, num_steps: int, num_chains: int, *, seed: int) -> Imputed:
    shape = tuple(part.images.shape[1:])
    mean, log_variance = model.encode(part.images, part.labels, part.mask)
    device = mean.device
    moments = _Moments(len(mean), part.images[0].numel(), 0, device)
    images, labels = (
        tensor.repeat_interleave(num_chains, 0) for tensor in (part.images, part.labels)
    )
    mask = part.mask.repeat_interleave(num_chains, 0) > 0
    complete, values = images, images
    for step in range(num_steps):
        noise = _normal(seed, part.samples, step, (num_chains, *mean.shape[1:])).to(device)
        if step == 0:
            z = sample_posterior(mean, log_variance, noise)
        else:  # what was drawn is shown as if it had been observed
            z = sample_posterior(*model.encode(complete, labels), noise.flatten(0, 1))
            z = z.view(noise.shape)
        params, values = _decoded(model, part, z)
        if step >= num_steps // 2:
            moments.add(values, torch.zeros(values.shape[:2], device=device))
        drawn = [
            model.likelihood.sample(
                own, torch_generator(seed, "impute-gibbs", sample, step, device=device)
            )
            for sample, own in zip(part.samples, params.split(num_chains), strict=True)
        ]
        complete = torch.where(mask, images, torch.cat(drawn))
    return moments.result(values, shape)


def _decoded(model: VAE, part: Incomplete, z: Tensor) -> tuple[Tensor, Tensor]:
    """Decoder outputs (n s, ...) and g(z), float32 (n, s, D), of z (n, s, *latent)."""
    height, width = part.images.shape[-2:]
    labels = part.labels.repeat_interleave(z.shape[1], 0)
    params = model.decode(z.flatten(0, 1), (height, width), labels)
    return params, model.likelihood.mean(params).flatten(1).view(*z.shape[:2], -1)


def _blocks(
    seed: int,
    samples: list[int],
    num_samples: int,
    num_draws: int,
    latent: tuple[int, ...],
    chunk: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normal noise (n, s, *latent) and Gumbel noise (n, s, J) for the next s of each image's K
    latents, n s at most `chunk`. Blocks are drawn whole: a shorter draw would not begin as a longer
    one does."""
    for block in range(-(-num_samples // BLOCK)):
        size = min(BLOCK, num_samples - block * BLOCK)
        noise = _normal(seed, samples, block, (BLOCK, *latent))[:, :size]
        uniform = torch.stack(
            [
                torch.rand(
                    BLOCK,
                    num_draws,
                    dtype=torch.float64,
                    generator=torch_generator(seed, "impute-draws", sample, block),
                )
                for sample in samples
            ]
        )[:, :size]
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        share = max(1, min(chunk // len(samples), size))
        yield from zip(noise.split(share, 1), gumbel.split(share, 1), strict=True)


def _normal(seed: int, samples: list[int], number: int, shape: tuple[int, ...]) -> Tensor:
    """Draw `number` of each image, float32 (n, *shape), made on CPU so that devices agree."""
    return torch.stack(
        [
            torch.randn(shape, generator=torch_generator(seed, "impute", sample, number))
            for sample in samples
        ]
    )
