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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_dist.config.commands import ImputeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import MASK_MEMBER, SUFFIXES
from vae_dist.data.reader import SampleReader, single_sample
from vae_dist.data.transforms import DRAWN
from vae_dist.data.writer import write_shards
from vae_dist.evaluation.importance import StreamedWeights, weighted_draws
from vae_dist.inference.load import Examples, Images, first_examples_by_shape
from vae_dist.models.latent import sample_posterior
from vae_dist.models.vae import NO_LABEL, VAE
from vae_dist.randomness import torch_generator
from vae_dist.tracking.images import file_name, to_uint8, with_holes

BLOCK = 32  # draws of one image that come from one generator


class Imputed(NamedTuple):
    """Values for every pixel, float32 in [-1, 1] on CPU; those of observed ones are the model's."""

    mean: Tensor  # (n, C, H, W)
    deviation: Tensor  # (n, C, H, W), standard deviation
    draws: Tensor  # (n, J, C, H, W)
    effective_samples: Tensor  # float64 (n,), (sum w)^2 / sum w^2


class Known(NamedTuple):
    """What is known of n images, on the model's device."""

    images: Tensor  # float32 (n, C, H, W)
    mask: Tensor  # (n, 1, H, W)
    labels: Tensor  # int64 (n,)
    numbers: Sequence[int]


@torch.inference_mode()
def impute(
    model: VAE,
    images: Tensor,
    mask: Tensor,
    *,
    method: str,
    num_samples: int,
    num_draws: int,
    seed: int,
    labels: Tensor | None = None,
    numbers: Sequence[int] = (),
    chunk: int = 256,
) -> Imputed:
    """Fill `images`, float32 (n, C, H, W) as `prepare` made them, where `mask` (n, 1, H, W) is 0;
    what stands there is not looked at. Draws belong to the `numbers` of the images (default: 0, 1,
    ...). At most `chunk` latents are decoded at once."""
    device = next(model.parameters()).device
    labels = torch.full((len(images),), NO_LABEL) if labels is None else labels
    numbers = numbers or range(len(images))
    values_of = {"single": _single, "importance": _importance, "gibbs": _gibbs}[method]
    draws_of_each = min(BLOCK, num_samples) if method == "importance" else num_draws
    group = max(1, chunk // draws_of_each)  # images
    parts = []
    for start in range(0, len(images), group):
        part = slice(start, start + group)
        known = Known(
            images[part].to(device), mask[part].to(device), labels[part].to(device), numbers[part]
        )
        moments = _Moments(len(known.numbers), images[0].numel(), num_draws, device)
        values = known.images
        for values, log_weights, gumbel in values_of(
            model, known, num_samples, num_draws, seed=seed, chunk=chunk
        ):
            moments.add(values, log_weights, gumbel)
        drawn = None if method == "importance" else values  # the last ones
        parts.append(moments.result(drawn, tuple(images.shape[1:])))
    imputed = Imputed(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if method == "single":
        one = torch.ones_like(imputed.effective_samples)
        return imputed._replace(mean=imputed.draws[:, 0], effective_samples=one)
    return imputed


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
        """`draws` (n, J, D) where they are not those of the Gumbel noise."""
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


# values g(z) (n, s, D) with their log weights (n, s), and Gumbel noise (n, s, J) to draw among them

Values = Iterator[tuple[Tensor, Tensor, Tensor | None]]


def _single(
    model: VAE, known: Known, num_samples: int, num_draws: int, *, seed: int, chunk: int
) -> Values:
    mean, log_variance = model.encode(known.images, known.labels, known.mask)
    noise = _normal(seed, known.numbers, 0, (num_draws, *mean.shape[1:])).to(mean.device)
    values = _decoded(model, known, sample_posterior(mean, log_variance, noise))[1]
    yield values, values.new_zeros(values.shape[:2]), None


def _importance(
    model: VAE, known: Known, num_samples: int, num_draws: int, *, seed: int, chunk: int
) -> Values:
    """n s at most `chunk`. Blocks are drawn whole: a shorter draw would not begin as a longer one
    does."""
    mean, log_variance = model.encode(known.images, known.labels, known.mask)
    for block in range(-(-num_samples // BLOCK)):
        size = min(BLOCK, num_samples - block * BLOCK)
        noise = _normal(seed, known.numbers, block, (BLOCK, *mean.shape[1:]))[:, :size]
        gumbel = _gumbel(seed, known.numbers, block, (BLOCK, num_draws))[:, :size]
        share = max(1, min(chunk // len(known.numbers), size))
        for of_z, of_draws in zip(noise.split(share, 1), gumbel.split(share, 1), strict=True):
            params, (log_weights,) = weighted_draws(
                model, known.images, of_z, mean, log_variance, labels=known.labels, mask=known.mask
            )
            values = model.likelihood.mean(params).flatten(1).view(*of_z.shape[:2], -1)
            yield values, log_weights, of_draws.to(mean.device)


def _gibbs(
    model: VAE, known: Known, num_samples: int, num_draws: int, *, seed: int, chunk: int
) -> Values:
    mean, log_variance = model.encode(known.images, known.labels, known.mask)
    device = mean.device
    images, labels, mask = (
        tensor.repeat_interleave(num_draws, 0)
        for tensor in (known.images, known.labels, known.mask > 0)
    )
    complete = images
    for step in range(num_samples):
        noise = _normal(seed, known.numbers, step, (num_draws, *mean.shape[1:])).to(device)
        if step == 0:
            z = sample_posterior(mean, log_variance, noise)
        else:  # what was drawn is shown as if it had been observed
            z = sample_posterior(*model.encode(complete, labels), noise.flatten(0, 1))
            z = z.view(noise.shape)
        params, values = _decoded(model, known, z)
        if step >= num_samples // 2:
            yield values, values.new_zeros(values.shape[:2]), None
        drawn = [
            model.likelihood.sample(
                own, torch_generator(seed, "impute-gibbs", number, step, device=device)
            )
            for number, own in zip(known.numbers, params.split(num_draws), strict=True)
        ]
        complete = torch.where(mask, images, torch.cat(drawn))


def _decoded(model: VAE, known: Known, z: Tensor) -> tuple[Tensor, Tensor]:
    """Decoder outputs (n s, ...) and g(z), float32 (n, s, D), of z (n, s, *latent)."""
    height, width = known.images.shape[-2:]
    labels = known.labels.repeat_interleave(z.shape[1], 0)
    params = model.decode(z.flatten(0, 1), (height, width), labels)
    return params, model.likelihood.mean(params).flatten(1).view(*z.shape[:2], -1)


def _normal(seed: int, numbers: Sequence[int], draw: int, shape: tuple[int, ...]) -> Tensor:
    """Draw number `draw` of each image, float32 (n, *shape), made on CPU so that devices agree."""
    generators = [torch_generator(seed, "impute", number, draw) for number in numbers]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def _gumbel(seed: int, numbers: Sequence[int], draw: int, shape: tuple[int, ...]) -> Tensor:
    generators = [torch_generator(seed, "impute-draws", number, draw) for number in numbers]
    uniform = [torch.rand(shape, dtype=torch.float64, generator=g) for g in generators]
    return -torch.log(-torch.log(torch.stack(uniform).clamp(min=1e-300)))


# images of shards or of a folder


@dataclass(frozen=True)
class FilledImage:
    """One image in the scale of its stored values (0 to 255, 0 to 65535, or floats in [-1, 1]);
    observed pixels are exactly as they were. Arrays are (C, H, W), draws (J, C, H, W)."""

    name: str  # of a folder for it: its number and what of its key can be in a file name
    key: str
    stored: Tensor  # what was given
    mask: Tensor  # uint8 (1, H, W), 1: observed
    truth_is_known: bool  # because the mask was drawn
    mean: np.ndarray  # float32
    deviation: np.ndarray  # float32, 0 where observed
    draws: np.ndarray  # float32
    effective_samples: float
    scale: float  # of stored values for one of [-1, 1]

    @property
    def missing_fraction(self) -> float:
        return 1.0 - float(self.mask.float().mean())

    def record(self) -> dict[str, str | float]:
        """As `imputed.json` holds it."""
        return {
            "folder": self.name,
            "key": self.key,
            "missing_fraction": self.missing_fraction,
            "effective_samples": self.effective_samples,
        }

    def pictures(self) -> dict[str, Tensor]:
        """uint8 by name; 8-bit pixels that were observed are those of the input, exactly."""
        shown = {"input": with_holes(self.stored[None], self.mask[None])[0]}
        shown["mean"] = self._picture(self.mean)
        for number, draw in enumerate(self.draws):
            shown[f"draw_{number}"] = self._picture(draw)
        # white: a deviation of half the range, as large as there is
        shown["std"] = to_uint8(torch.from_numpy(2 * self.deviation / self.scale - 1))
        return shown

    def row(self) -> list[Tensor]:
        """Of the overview: the truth where it is known, then `pictures`."""
        truth = [to_uint8(self.stored)] if self.truth_is_known else []
        return [*truth, *self.pictures().values()]

    def _picture(self, values: np.ndarray) -> Tensor:
        shift = 0.0 if self.scale == 1.0 else 1.0
        filled = to_uint8(torch.from_numpy(values / self.scale - shift))
        return torch.where(self.mask > 0, to_uint8(self.stored), filled)


def fill(
    model: VAE, images: Images, command: ImputeCommand, *, bits: int, names: Sequence[str] | None
) -> list[FilledImage]:
    """The readable ones among the first `num_images`, in their order. `names`: what to call them
    instead of their keys. Raises ConfigError when there is none."""
    scale = {16: 65535 / 2, 32: 1.0}.get(bits, 255 / 2)
    shift = 0.0 if bits == 32 else 1.0
    filled: dict[int, FilledImage] = {}
    for examples in first_examples_by_shape(images, command.num_images, names=names):
        numbers = examples.samples.tolist()
        assert examples.masks is not None
        imputed = impute(
            model,
            prepared(model, examples),
            examples.masks,
            method=command.method,
            labels=examples.labels,
            numbers=numbers,
            num_samples=command.samples,
            num_draws=command.draws,
            seed=command.seed,
            chunk=command.batch_size,
        )
        for i, number in enumerate(numbers):
            stored, mask = examples.images[i], examples.masks[i]
            observed = mask.numpy() > 0
            given = stored.numpy().astype(np.float32)
            key = names[number] if names is not None else _key(images, number)
            filled[number] = FilledImage(
                name=file_name(number, key),
                key=key,
                stored=stored,
                mask=mask,
                truth_is_known=images.settings.mask in DRAWN,
                mean=np.where(observed, given, (imputed.mean[i].numpy() + shift) * scale),
                deviation=np.where(observed, 0.0, imputed.deviation[i].numpy() * scale),
                draws=np.where(observed, given, (imputed.draws[i].numpy() + shift) * scale),
                effective_samples=float(imputed.effective_samples[i]),
                scale=scale,
            )
    return [filled[number] for number in sorted(filled)]


def prepared(model: VAE, examples: Examples) -> Tensor:
    """The images as the model takes them. Noise that training adds is replaced by its middle: grey
    levels are binarised at one half and dequantised in the middle of their bins."""
    half = torch.full(examples.images.shape, 0.5)
    return model.likelihood.prepare(examples.images, half)


def _key(images: Images, sample: int) -> str:
    """The key of a sample in its shard."""
    reader = SampleReader(images.index, images.settings, seed=0)
    (run,) = reader.in_order(sample, sample + 1)
    key: str = single_sample(reader.read(*run)[0], images.index.paths[run.shard])["__key__"]
    return key


def is_folder_of_pictures(path: str) -> bool:
    folder = Path(path)
    return folder.is_dir() and not any(folder.glob("*.tar")) and bool(_pictures(folder))


def shards_of_pictures(
    folder: Path, out: Path, num_pictures: int
) -> tuple[str, list[str], Literal["member", "alpha"]]:
    """Writes the first pictures, by name, with their masks as shards. Returns these, the names of
    the pictures and the kind of their masks: member where one has a NAME.mask.png, else alpha."""
    pictures = _pictures(folder)[:num_pictures]
    samples: list[dict[str, str | bytes]] = []
    try:
        for number, path in enumerate(pictures):
            samples.append({"__key__": f"{number:06d}", path.suffix[1:].lower(): path.read_bytes()})
            mask = path.with_name(f"{path.stem}.{MASK_MEMBER}")
            if mask.is_file():
                samples[-1][MASK_MEMBER] = mask.read_bytes()
        write_shards(samples, out, num_shards=1)
    except OSError as error:
        raise ConfigError(f"data={folder}: cannot be read ({error})") from None
    has_masks = any(MASK_MEMBER in sample for sample in samples)
    return str(out), [path.stem for path in pictures], "member" if has_masks else "alpha"


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower()[1:] in SUFFIXES
        and not path.name.endswith(f".{MASK_MEMBER}")
        and path.is_file()
    )
