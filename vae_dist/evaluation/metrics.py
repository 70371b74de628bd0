"""What an evaluation measures beside the bound: latents, reconstructions, other priors.

A `Metric` is updated with each image once, over all ranks together, and keeps float64 sums;
`compute` adds those of all ranks. So a figure depends neither on the number of ranks nor on the
batch size.

Reconstructions y are means of p(x | z = E[z|x]); images and y are in [0, 1], so the data range is
1. The mean of a distribution is smooth where a draw of it is not: these figures say what the latent
keeps, not how natural an image looks.

    PSNR = -10 log10 mean((x - y)^2), dB
    SSIM, MS-SSIM: Gaussian window of 11 pixels, sigma 1.5, five scales (Wang et al. 2004, 2003)

Of each unit u of the latent, a dimension of a vector one or a channel of a spatial one, with E and
Var over images (and positions of a channel):

    KL_u = E[KL(q(z_u|x) || N(0, 1))], nats per image (summed over positions)
    u is active where Var[E[z_u|x]] > 0.01                         (Burda et al. 2016)

and what z tells of x, with q(z) the mean of q(z|x) over images (Hoffman and Johnson 2016):

    I(x; z) = E[KL(q(z|x) || p(z))] - KL(q(z) || p(z)) = E[log q(z|x) - log q(z)]
            ~ 1/M sum_i log( q(z_i|x_i) / (1/M sum_j q(z_i|x_j)) ),   z_i ~ q(z_i|x_i)

over the first M images, the estimate of He et al. (2019) among others. It is InfoNCE with the best
critic there is (Poole et al. 2019): on average at most I, and never above log M = 6.9 nats for
M = 1024. A value at log M says only that each code fits its own image and no other; the rate is a
bound from above.

Legend: b images of one shape C x H x W, U units, P positions, D = U P.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vae_dist.config.errors import ConfigError
from vae_dist.distributed import Runtime
from vae_dist.models.latent import LatentPrior, kl_per_value
from vae_dist.models.networks import Lpips
from vae_dist.models.vae import VAE, VAEOutput
from vae_dist.tracking.images import to_uint8


class Inputs(NamedTuple):
    """What a model is given, on its device; padding is left out."""

    levels: Tensor  # (b, C, H, W) as stored: uint8, uint16 or float32
    images: Tensor  # (b, C, H, W) float32 in [-1, 1], as `prepare` made them
    samples: list[int]  # number of each image in index order
    labels: Tensor | None = None  # int64 (b,), -1 where an image has none
    mask: Tensor | None = None  # uint8 (b, 1, H, W), 1: observed; None: all pixels are

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.images.shape[-2:]
        return height, width

    @property
    def dims(self) -> Tensor:
        """Values of each image that its likelihood counts, float64 (b,)."""
        if self.mask is not None:
            return self.images.shape[1] * self.mask.flatten(1).sum(1, dtype=torch.float64)
        num_dims = self.images[0].numel()
        return torch.full((len(self.images),), num_dims, dtype=torch.float64).to(self.images.device)


@dataclass(frozen=True)
class EvaluatedBatch:
    """A batch and the output of the model's forward: encoder and decoder run once per image."""

    model: VAE
    inputs: Inputs
    noise: Tensor  # (b, *latent) of the z that `output` was decoded from
    output: VAEOutput

    @cached_property
    def means(self) -> Tensor:
        """(b, *latent) of q(z|x); of a ladder, whose `output.mean` is given the draws above, on the
        path of the means."""
        shown = self.inputs.images, self.inputs.labels, self.inputs.mask
        return self.model.encode(*shown)[0] if self.model.num_levels else self.output.mean

    @cached_property
    def pictures(self) -> tuple[Tensor, Tensor]:
        """Images and their reconstructions E[x | z = E[z|x]], float32 (b, C, H, W) in [0, 1]; where
        images have 8 bits, both are rounded to them, as a PNG of them is. Of images that are cut to
        fewer bits, what is left is the original: the model has seen no other."""
        params = self.model.decode(self.means, self.inputs.image_size, self.inputs.labels)
        means = self.model.likelihood.mean(params)
        levels = self.inputs.levels
        if levels.dtype == torch.uint8:
            originals = self.model.likelihood.levels.centers(levels)
            return to_uint8(originals).float() / 255, to_uint8(means).float() / 255
        means = (means.float() + 1).clamp(0, 2) / 2
        if levels.dtype == torch.uint16:
            return levels.float() / 65535, means
        return (levels.float() + 1) / 2, means


@dataclass(frozen=True)
class Report:
    """Figures by name; a note says in a sentence why one that was asked for is missing."""

    figures: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


class Metric(Protocol):
    def update(self, batch: EvaluatedBatch) -> None:
        """Called by each rank for each of its batches, in inference mode."""

    def compute(self, runtime: Runtime) -> Report:
        """Called once, by every rank together; the same on each."""


class Sums:
    """Float64 sums over images, by name, and of `images` their number."""

    def __init__(self, device: torch.device, *names: str) -> None:
        self._names = (*names, "images")
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)

    def add(self, **of_images: Tensor) -> None:
        """A value of each image for each name, (b,)."""
        of_images["images"] = torch.ones_like(next(iter(of_images.values())))
        self._sums += torch.stack([of_images[name].double() for name in self._names]).sum(1)

    def over_ranks(self, runtime: Runtime) -> dict[str, float]:
        return dict(zip(self._names, runtime.sum_over_ranks(self._sums).tolist(), strict=True))


def mean_and_error(total: float, squares: float, count: float) -> tuple[float, float]:
    """Mean of `count` values from their sum and sum of squares, and its standard error (0 for one
    value)."""
    mean = total / count
    variance = max(0.0, squares / count - mean * mean)
    return mean, (variance / max(1.0, count - 1.0)) ** 0.5


class PriorMetric:
    """`neg_elbo_NAME_nats` and `rate_NAME_nats` under a prior other than N(0, I), whose rate
    log q(z|x) - log p(z) has no closed form: unbiased, from the one draw that the ELBO used."""

    def __init__(self, name: str, prior: LatentPrior, device: torch.device) -> None:
        self._name, self._prior = name, prior
        self._sums = Sums(device, "rate", "neg_elbo", "square")

    def update(self, batch: EvaluatedBatch) -> None:
        output, noise = batch.output, batch.noise.double()
        squares = noise.square() + output.log_variance.double() + math.log(2 * math.pi)
        rate = -0.5 * squares.flatten(1).sum(1) - self._prior.log_prob(output.z)
        neg_elbo = rate - output.log_likelihood.double()
        self._sums.add(rate=rate, neg_elbo=neg_elbo, square=neg_elbo.square())

    def compute(self, runtime: Runtime) -> Report:
        sums, name = self._sums.over_ranks(runtime), self._name
        mean, error = mean_and_error(sums["neg_elbo"], sums["square"], sums["images"])
        return Report(
            {
                f"neg_elbo_{name}_nats": mean,
                f"neg_elbo_{name}_se_nats": error,
                f"rate_{name}_nats": sums["rate"] / sums["images"],
            }
        )


# reconstructions

LARGEST_PSNR_DB = 100.0  # of an image that is reconstructed exactly, whose PSNR has no bound
VALUES_AT_ONCE = 2**20  # of the images that go through a metric together: 85 of 64x64 RGB


class Comparison(NamedTuple):
    """images, reconstructions (b, C, H, W) in [0, 1] -> (b,); of images of this side at least."""

    function: Callable[[Tensor, Tensor], Tensor]
    smallest_side: int


def psnr_db(images: Tensor, reconstructions: Tensor) -> Tensor:
    squares = (images - reconstructions).double().square().flatten(1).mean(1)
    return -10 * torch.log10(squares.clamp(min=10 ** (-LARGEST_PSNR_DB / 10)))


def comparisons(names: Sequence[str]) -> dict[str, Comparison]:
    """Those of psnr, ssim and ms_ssim that are among the names. Raises ConfigError where the
    package is missing that has them."""
    found = {"psnr_db": Comparison(psnr_db, 1)} if "psnr" in names else {}
    if "ssim" in names or "ms_ssim" in names:
        try:
            import torchmetrics.functional.image as torchmetrics
        except ImportError:
            raise ConfigError(
                "metrics=ssim and metrics=ms_ssim need torchmetrics: "
                "pip install 'vae_dist[metrics]'"
            ) from None
        ssim = torchmetrics.structural_similarity_index_measure  # a window of 11 pixels
        ms_ssim = torchmetrics.multiscale_structural_similarity_index_measure  # of 176 at the fifth
        every = {"ssim": Comparison(_each(ssim), 11), "ms_ssim": Comparison(_each(ms_ssim), 176)}
        found |= {name: comparison for name, comparison in every.items() if name in names}
    return found


def _each(function: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def compare(images: Tensor, reconstructions: Tensor) -> Tensor:
        # float64: a variance is the difference of two means, where an image is flat a small one
        pair = reconstructions.double(), images.double()
        values: Tensor = function(*pair, data_range=1.0, reduction="none")
        return values.reshape(len(images))  # torchmetrics squeezes a batch of one

    return compare


def lpips_comparison(network: Lpips, smallest_side: int) -> Comparison:
    return Comparison(
        lambda *pair: network(*(2 * in_colour(images) - 1 for images in pair)), smallest_side
    )


def in_colour(images: Tensor) -> Tensor:
    """(b, 3, H, W) for networks that know no others; grey is repeated."""
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ConfigError(
            f"lpips, rfid and fid are defined for grey and RGB images, not for {channels} "
            "channels; leave them out of metrics="
        )
    return images.expand(-1, 3, -1, -1)


class ReconstructionMetric:
    """Means of comparisons over the images that are large enough."""

    def __init__(self, compare: Mapping[str, Comparison], device: torch.device) -> None:
        self._compare = compare
        self._sums = {name: Sums(device, "value", "count") for name in compare}

    def update(self, batch: EvaluatedBatch) -> None:
        images, reconstructions = batch.pictures
        share = max(1, VALUES_AT_ONCE // math.prod(images.shape[1:]))
        one = images.new_ones(len(images))
        for name, (function, smallest) in self._compare.items():
            if min(images.shape[-2:]) < smallest:
                self._sums[name].add(value=0 * one, count=0 * one)
                continue
            pairs = zip(images.split(share), reconstructions.split(share), strict=True)
            values = torch.cat([function(*pair).double() for pair in pairs])
            self._sums[name].add(value=values, count=one)

    def compute(self, runtime: Runtime) -> Report:
        report = Report()
        for name, (_, smallest) in self._compare.items():
            value, count, num_images = self._sums[name].over_ranks(runtime).values()
            if count:
                report.figures[name] = value / count
            if count < num_images:
                report.notes[name] = (
                    f"{int(num_images - count)} of {int(num_images)} images have a side of less "
                    f"than {smallest} pixels, which {name} needs, and are left out of it"
                )
        return report


# latents

ACTIVE_VARIANCE = 0.01
ACTIVE_NATS = 0.1  # of a ladder's group
INFORMATION_IMAGES = 1024  # M, fewer where a latent is so large that
INFORMATION_VALUES = 2**20  # M D would be more than this


class LatentReport(NamedTuple):
    active_units: int
    active_fraction: float  # of all units
    posterior_variance: float  # mean over images, units and positions; 1 is the prior's
    # estimate from below, at most log of the images it rests on; None for a ladder
    mutual_information_nats: float | None
    kl_nats_per_unit: list[float]  # (U,)


class LatentSums:
    """Float64 sums over the images of one rank; `compute` adds those of all ranks."""

    def __init__(self, num_units: int, device: torch.device) -> None:
        # per unit: KL, mean, mean squared, variance; then positions and images
        self._per_unit = torch.zeros(4, num_units, dtype=torch.float64, device=device)
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)
        self._first: dict[int, Tensor] = {}  # of the first images: (3, U, *positions)

    def update(self, output: VAEOutput, samples: Sequence[int]) -> None:
        """Of the images that count, with their numbers."""
        mean, log_variance, z = output.mean, output.log_variance, output.z  # (b, U, *positions)
        limit = min(INFORMATION_IMAGES, INFORMATION_VALUES // z[0].numel())
        for row, sample in enumerate(samples):
            if sample < limit:
                self._first[sample] = torch.stack([mean[row], log_variance[row], z[row]]).cpu()
        mean = mean.flatten(2) if mean.ndim > 2 else mean.unsqueeze(2)  # (b, U, P)
        log_variance = log_variance.reshape(mean.shape)
        kl = kl_per_value(mean, log_variance)
        terms = torch.stack([kl, mean, mean.square(), log_variance.exp()]).double()
        self._per_unit += terms.sum((1, 3))
        self._counts += self._counts.new_tensor([mean.shape[0] * mean.shape[2], mean.shape[0]])

    def compute(self, runtime: Runtime) -> LatentReport:
        per_unit = runtime.sum_over_ranks(self._per_unit).cpu()
        num_positions, num_images = runtime.sum_over_ranks(self._counts).tolist()
        kl, mean, square, variance = per_unit / max(1.0, num_positions)
        active = int(((square - mean.square()) > ACTIVE_VARIANCE).sum())
        first = dict(item for of_rank in runtime.gather(self._first) for item in of_rank.items())
        return LatentReport(
            active_units=active,
            active_fraction=active / len(kl),
            posterior_variance=float(variance.mean()),
            mutual_information_nats=_information(first),
            kl_nats_per_unit=(kl * num_positions / max(1.0, num_images)).tolist(),
        )


class LadderSums:
    """The same of a ladder, whose units are its groups: their posteriors depend on the draws above
    them, so that there is no KL to N(0, I) and no q(z_i|x_j)."""

    def __init__(self, device: torch.device) -> None:
        self._kl: Tensor | float = 0.0  # of each group, on the CPU; a rank may have no image
        self._sums = Sums(device, "variance")

    def update(self, output: VAEOutput, samples: Sequence[int]) -> None:
        self._kl = self._kl + output.kl.double().sum(0).cpu()
        variance = output.log_variance.double().exp().flatten(1).mean(1)
        self._sums.add(variance=variance)

    def compute(self, runtime: Runtime) -> LatentReport:
        sums = self._sums.over_ranks(runtime)
        rates = torch.as_tensor(sum(runtime.gather(self._kl)) / sums["images"]).tolist()
        active = sum(rate > ACTIVE_NATS for rate in rates)
        spread = sums["variance"] / sums["images"]
        return LatentReport(active, active / len(rates), spread, None, rates)


def _information(first: Mapping[int, Tensor]) -> float:
    """Of the images that share the most frequent latent shape, in the order of their numbers."""
    if not first:
        return 0.0
    num_of = Counter(tuple(moments.shape) for moments in first.values())
    shape = max(num_of, key=lambda shape: (num_of[shape], shape))
    images = [moments for _, moments in sorted(first.items()) if tuple(moments.shape) == shape]
    return mutual_information_nats(*torch.stack(images).flatten(2).unbind(1))


def mutual_information_nats(mean: Tensor, log_variance: Tensor, z: Tensor) -> float:
    """The estimate above for M posteriors and a draw of each, all (M, D)."""
    mean, log_variance, z = mean.double(), log_variance.double(), z.double()
    precision = torch.exp(-log_variance)
    # log q(z_i|x_j) as products of matrices, without the D/2 log 2 pi that cancels: (M, M)
    constant = (log_variance + mean.square() * precision).sum(1)
    log_q = z @ (mean * precision).T - 0.5 * (z.square() @ precision.T + constant)
    log_aggregate = torch.logsumexp(log_q, 1) - math.log(len(z))
    return float((log_q.diagonal() - log_aggregate).mean())
