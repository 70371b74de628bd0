"""Missing pixels of images, filled by a trained model: E[x_missing | x_observed] and draws of it.

With g(z) = E[x|z] and K = `num_samples`:

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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vae_dist.config.commands import ImputeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import MASK_MEMBER, SUFFIXES
from vae_dist.data.reader import single_sample
from vae_dist.data.writer import write_shards
from vae_dist.evaluation.importance import StreamedWeights, weighted_draws
from vae_dist.files import progress_bar
from vae_dist.inference.load import Images, first_examples_by_shape
from vae_dist.models.latent import sample_posterior
from vae_dist.models.vae import NO_LABEL, VAE, each
from vae_dist.randomness import draws, torch_generator
from vae_dist.tracking.images import file_name, to_uint8, with_holes

BLOCK = 32  # draws of one image that come from one generator
RAND64 = partial(torch.rand, dtype=torch.float64)
LEVELS = {torch.uint8: 255, torch.uint16: 65535}  # largest stored value; floats are in [-1, 1]


class Imputed(NamedTuple):
    """Values for every pixel, float32 in [-1, 1] on CPU; those of observed ones are the model's."""

    mean: Tensor  # (n, C, H, W)
    deviation: Tensor  # (n, C, H, W), standard deviation
    draws: Tensor  # (n, J, C, H, W)
    effective_samples: Tensor  # float64 (n,), (sum w)^2 / sum w^2


@dataclass(frozen=True)
class _Task:
    """What is known of n images, on the model's device, and how to fill them."""

    model: VAE
    images: Tensor  # float32 (n, C, H, W)
    mask: Tensor  # (n, 1, H, W)
    labels: Tensor  # int64 (n,)
    numbers: Sequence[int]
    how: ImputeCommand

    def noise(self, number: int, *shape: int) -> Tensor:
        """Draw `number` of each image, float32 (n, *shape) on the CPU."""
        return draws(torch.randn, self.how.seed, "impute", self.numbers, shape, number)


# decoder outputs (n s, ...), their log weights (n, s), and Gumbel noise (n, s, J) to draw with
Weighted = tuple[Tensor, Tensor, Tensor | None]


@torch.inference_mode()
def impute(
    model: VAE,
    images: Tensor,
    mask: Tensor,
    how: ImputeCommand,
    *,
    labels: Tensor | None = None,
    numbers: Sequence[int] = (),
) -> Imputed:
    """Fill `images`, float32 (n, C, H, W) as `prepare` made them, where `mask` (n, 1, H, W) is 0;
    what stands there is not looked at. `how` has method, samples, draws, seed and batch_size.
    Draws belong to the `numbers` of the images (default: 0, 1, ...)."""
    device = next(model.parameters()).device
    labels = torch.full((len(images),), NO_LABEL) if labels is None else labels
    numbers = numbers or range(len(images))
    is_weighted = how.method == "importance"
    at_once = min(BLOCK, how.samples) if is_weighted else how.draws
    parts = []
    with progress_bar("filled", len(images), unit="images") as progress:
        for start in range(0, len(images), group := max(1, how.batch_size // at_once)):
            part = slice(start, start + group)
            shown, observed, known = (tensor[part].to(device) for tensor in (images, mask, labels))
            task = _Task(model, shown, observed, known, numbers[part], how)
            parts.append(_summed(task, _importance(task) if is_weighted else _chains(task)))
            progress(start + len(shown))
    imputed = Imputed(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if how.method == "single":
        one = torch.ones_like(imputed.effective_samples)
        return imputed._replace(mean=imputed.draws[:, 0], effective_samples=one)
    return imputed


def _summed(task: _Task, parts: Iterable[Weighted]) -> Imputed:
    """Weighted mean, deviation and draws of g(z) that comes in parts; log weights of any size.

    A draw is the value of the largest log weight + Gumbel noise, which makes its probability the
    normalised weight; without noise the last values are the draws.
    """
    images, device = task.images, task.images.device
    n, dims, num_draws = len(images), images[0].numel(), task.how.draws
    weights = StreamedWeights(n, device=device)
    sums = torch.zeros(2, n, dims, dtype=torch.float64, device=device)  # of g(z) and its square
    drawn = torch.zeros(n, num_draws, dims, device=device)
    best = torch.full((n, num_draws), -torch.inf, dtype=torch.float64, device=device)
    for params, log_weights, gumbel in parts:
        values = task.model.likelihood.mean(params).flatten(1).view(*log_weights.shape, -1)
        part, shrink = weights.add(log_weights)
        sums *= shrink.unsqueeze(1)
        sums[0] += torch.einsum("ns,nsd->nd", part.float(), values)
        sums[1] += torch.einsum("ns,nsd->nd", part.float(), values.square())
        if gumbel is None:
            drawn = values
            continue
        largest, place = (log_weights.double().unsqueeze(2) + gumbel).max(1)  # (n, J)
        found = torch.gather(values, 1, place.unsqueeze(2).expand(-1, -1, dims))
        drawn = torch.where((largest > best).unsqueeze(2), found, drawn)
        best = torch.maximum(largest, best)
    mean, square = sums / weights.sum.unsqueeze(1)
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return Imputed(
        mean.float().view_as(images).cpu(),
        deviation.float().view_as(images).cpu(),
        drawn.view(*drawn.shape[:2], *images.shape[1:]).cpu(),
        weights.effective_samples.cpu(),
    )


def _importance(task: _Task) -> Iterator[Weighted]:
    """n s at most `batch_size`. Blocks are drawn whole: a shorter draw would not begin as a longer
    one does."""
    model, images, how = task.model, task.images, task.how
    mean, log_variance = model.encode(images, task.labels, task.mask)
    for block in range(-(-how.samples // BLOCK)):
        size = min(BLOCK, how.samples - block * BLOCK)
        noise = task.noise(block, BLOCK, *mean.shape[1:])[:, :size]
        shape = BLOCK, how.draws
        uniform = draws(RAND64, how.seed, "impute-draws", task.numbers, shape, block)[:, :size]
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        share = max(1, min(how.batch_size // len(mean), size))
        for of_z, of_draws in zip(noise.split(share, 1), gumbel.split(share, 1), strict=True):
            params, (log_weights,) = weighted_draws(
                model, images, of_z, mean, log_variance, labels=task.labels, mask=task.mask
            )
            yield params, log_weights, of_draws.to(mean.device)


def _chains(task: _Task) -> Iterator[Weighted]:
    """J chains of each image; of one step: single draws."""
    model, chains = task.model, task.how.draws
    num_steps = 1 if task.how.method == "single" else task.how.samples
    observed, images, labels = (
        each(tensor, chains) for tensor in (task.mask > 0, task.images, task.labels)
    )
    size, device = (images.shape[-2], images.shape[-1]), images.device
    moments = model.encode(task.images, task.labels, task.mask)
    mean, log_variance = (each(moment, chains) for moment in moments)
    for step in range(num_steps):
        noise = task.noise(step, chains, *mean.shape[1:]).flatten(0, 1).to(device)
        params = model.decode(sample_posterior(mean, log_variance, noise), size, labels)
        if step >= num_steps // 2:
            yield params, params.new_zeros(len(task.images), chains), None
        if step < num_steps - 1:  # what is drawn is shown as if it had been observed
            drawn = [
                model.likelihood.sample(
                    own, torch_generator(task.how.seed, "impute-gibbs", number, step, device=device)
                )
                for number, own in zip(task.numbers, params.split(chains), strict=True)
            ]
            complete = torch.where(observed, images, torch.cat(drawn))
            mean, log_variance = model.encode(complete, labels)


# images of shards or of a folder


class FilledImage(NamedTuple):
    """One image; observed pixels of arrays and pictures are exactly as they were."""

    folder: str  # its number and what of its key can be in a file name
    key: str
    stored: Tensor  # (C, H, W), what was given
    mask: Tensor  # uint8 (1, H, W), 1: observed
    imputed: Imputed  # of one image: mean (C, H, W), draws (J, C, H, W)

    def arrays(self) -> dict[str, Tensor]:
        """Float32 by name, in the scale of the stored values: (C, H, W), draws (J, C, H, W)."""
        levels, given = LEVELS.get(self.stored.dtype), self.stored.float()
        scale, shift = (levels / 2, 1.0) if levels else (1.0, 0.0)
        mean, deviation, draws, _ = self.imputed
        return {
            "mean": torch.where(self.mask > 0, given, (mean + shift) * scale),
            "std": torch.where(self.mask > 0, 0.0, deviation * scale),
            "draws": torch.where(self.mask > 0, given, (draws + shift) * scale),
        }

    def pictures(self) -> dict[str, Tensor]:
        """uint8 (C, H, W) by name."""
        seen, (mean, deviation, draws, _) = to_uint8(self.stored), self.imputed
        values = {"mean": mean, **{f"draw_{number}": draw for number, draw in enumerate(draws)}}
        return {
            "input": with_holes(self.stored[None], self.mask[None])[0],
            **{name: torch.where(self.mask > 0, seen, to_uint8(x)) for name, x in values.items()},
            # white: a deviation of half the range, as large as there is
            "std": torch.where(self.mask > 0, 0, to_uint8(2 * deviation - 1)),
        }


def fill(
    model: VAE, images: Images, command: ImputeCommand, *, names: Sequence[str] | None
) -> list[FilledImage]:
    """The readable ones among the first `num_images`, in their order. `names`: what to call them
    instead of their keys. Raises ConfigError when there is none, or nothing is missing."""
    batches = first_examples_by_shape(images, command.num_images, names=names)
    if all(batch.masks is None or batch.masks.all() for batch in batches):
        raise ConfigError(
            f"no pixel of {command.data or 'the validation shards'} is missing: give pictures a "
            "NAME.mask.png beside them, black where a pixel is missing, or an alpha channel; or "
            "try mask=half, rectangle or random"
        )
    filled: dict[int, FilledImage] = {}
    for batch in batches:
        stored, masks, numbers = batch.images, batch.masks, batch.samples.tolist()
        assert masks is not None
        # noise that training adds is replaced by its middle
        shown = model.likelihood.prepare(stored, torch.full(stored.shape, 0.5))
        imputed = impute(model, shown, masks, command, labels=batch.labels, numbers=numbers)
        for i, number in enumerate(numbers):
            key = _key(images, number) if names is None else names[number]
            one = Imputed(*(column[i] for column in imputed))
            filled[number] = FilledImage(file_name(number, key), key, stored[i], masks[i], one)
    return [filled[number] for number in sorted(filled)]


def _key(images: Images, sample: int) -> str:
    """The key of a sample in its shard."""
    reader = images.reader()
    (run,) = reader.in_order(sample, sample + 1)
    key: str = single_sample(reader.read([run])[0], images.index.paths[run.shard])["__key__"]
    return key


def pictures_of(folder: str) -> list[Path]:
    """Those in a folder without shards, by name; none where it is no such folder."""
    place = Path(folder)
    if any(place.glob("*.tar")):
        return []
    found = (path for path in place.glob("*") if path.suffix.lower()[1:] in SUFFIXES)
    return sorted(path for path in found if not path.name.endswith(f".{MASK_MEMBER}"))


def write_pictures(pictures: Sequence[Path], out: Path) -> Literal["member", "alpha"]:
    """Write pictures with their masks as one shard in the folder `out`. The kind of their masks:
    member where one has a NAME.mask.png, else alpha. Raises ConfigError."""
    samples: list[dict[str, str | bytes]] = []
    try:
        for number, path in enumerate(pictures):
            samples.append({"__key__": f"{number:06d}", path.suffix[1:].lower(): path.read_bytes()})
            mask = path.with_name(f"{path.stem}.{MASK_MEMBER}")
            if mask.is_file():
                samples[-1][MASK_MEMBER] = mask.read_bytes()
        write_shards(samples, out, num_shards=1)
    except OSError as error:
        raise ConfigError(f"data={pictures[0].parent}: cannot be read ({error})") from None
    return "member" if any(MASK_MEMBER in sample for sample in samples) else "alpha"
