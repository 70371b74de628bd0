"""Figures that tell, before a diffusion model is trained on latents, how hard they are to learn.

Latents are posterior means, normalised for each channel over the images (mean 0, variance 1), as
a diffusion model gets them. Formulas of viv, lnc and sec are from the text of arXiv 2606.03578; its
code could not be read, so their values may differ from the authors' by a convention.

    viv      velocity irreducible variance, in units of the latents' variance. Of a Gaussian with
             eigenvalues l, the velocity e - z of x_t = (1 - t) z + t e, e ~ N(0, 1), has at best
             the error E_t[l / ((1 - t)^2 l + t^2)] = pi/2 sqrt(l); the mean over eigenvalues and
             classes, of covariances taken as (channels x channels) kron (positions x positions)
    lnc      share of images whose class is that of the nearest class mean of latents averaged over
             positions; means are of the other half of the images
    sec      share of the energy of the DCT-II of channels at frequencies of half the sampling
             limit and above, vertically or horizontally: 3/4 of white noise, 0 of a constant
    lattice  of reconstructions of constant colours: the share of what is not constant that
             repeats with the stride of the decoder, 0 to 1, and its root mean square in levels of
             8 bits. Transposed and sub-pixel convolutions print such grids.

The first three rest on the first images, as many as `SAMPLE_BYTES` of latents hold. All are means
over images of one latent shape, the most frequent one.

Legend: N images, C channels, h x w positions, P = h w.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vae_dist.distributed import Runtime
from vae_dist.evaluation.metrics import EvaluatedBatch, Report
from vae_dist.models.vae import VAE

SAMPLE_BYTES = 2**28  # of float32 latents, over all ranks
LARGEST_COVARIANCE = 4096  # positions; its eigenvalues take a minute
LATTICE_PERIODS = 8  # of the stride, on the shorter side of a constant image, and at least
LATTICE_BORDER = 2  # periods at each side that are left out: zero padding shows there
LATTICE_LEVELS = (-0.6, 0.0, 0.6)  # of each channel, of [-1, 1]


def normalised(latents: Tensor) -> Tensor:
    """(N, C, h, w) of any dtype -> float64 with mean 0 and variance 1 in each channel; a channel
    that never varies is 0."""
    latents = latents.double()
    dims = (0, 2, 3)
    std = latents.std(dims, keepdim=True, correction=0)
    return (latents - latents.mean(dims, keepdim=True)) / std.where(std > 0, 1.0)


def velocity_irreducible_variance(latents: Tensor, labels: Sequence[int]) -> float:
    """`viv` of normalised latents (N, C, h, w); the mean over classes of at least two images,
    weighted by their images. nan where there is none, or where the latent is too large."""
    flat = latents.flatten(2)
    if flat.shape[2] > LARGEST_COVARIANCE:
        return math.nan
    total = count = 0.0
    of_image = torch.as_tensor(labels)
    for label in of_image.unique():
        members = flat[of_image == label]
        if len(members) < 2:
            continue
        centred = members - members.mean(0)
        degrees = len(members) - 1
        num_channels, num_positions = centred.shape[1:]
        channels = torch.einsum("ncp,ndp->cd", centred, centred) / (degrees * num_positions)
        positions = torch.einsum("ncp,ncq->pq", centred, centred) / (degrees * num_channels)
        roots = [torch.linalg.eigvalsh(part).clamp(min=0).sqrt() for part in (channels, positions)]
        scale = float(channels.diagonal().mean().sqrt())  # in both factors
        value = float(roots[0].mean() * roots[1].mean()) / scale if scale else 0.0
        total, count = total + len(members) * math.pi / 2 * value, count + len(members)
    return total / count if count else math.nan


def nearest_class_accuracy(latents: Tensor, labels: Sequence[int]) -> float:
    """`lnc` of normalised latents (N, C, h, w), 0 to 1; nan where no half has two classes."""
    pooled, of_image = latents.mean((2, 3)), torch.as_tensor(labels)
    right = asked = 0
    for half in (0, 1):
        tested, others = pooled[half::2], pooled[1 - half :: 2]
        classes = of_image[1 - half :: 2].unique()
        is_known = torch.isin(of_image[half::2], classes)
        if len(classes) < 2 or not is_known.any():
            continue
        means = torch.stack([others[of_image[1 - half :: 2] == label].mean(0) for label in classes])
        nearest = classes[torch.cdist(tested[is_known], means).argmin(1)]
        right += int((nearest == of_image[half::2][is_known]).sum())
        asked += len(nearest)
    return right / asked if asked else math.nan


def high_frequency_share(latents: Tensor) -> float:
    """`sec` of normalised latents (N, C, h, w), 0 to 1."""
    down, across = (_dct_matrix(side).to(latents) for side in latents.shape[2:])
    energy = torch.zeros(latents.shape[2:], dtype=torch.float64)
    for image in latents:
        energy += (down @ image @ across.T).square().sum(0)
    low = energy[: math.ceil(len(down) / 2), : math.ceil(len(across) / 2)].sum()
    return float(1 - low / energy.sum()) if energy.any() else 0.0


def _dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, float64 (frequencies, values)."""
    number = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (number + 0.5) * number.unsqueeze(1))
    matrix[0] *= 0.5**0.5
    return matrix * (2 / size) ** 0.5


def lattice_share(image: Tensor, period: int) -> tuple[float, float]:
    """(share, root mean square) of what repeats every `period` pixels in both directions, of the
    part of (C, H, W) that is not constant. H and W are multiples of the period."""
    image = image.double() - image.double().mean((1, 2), keepdim=True)
    channels, height, width = image.shape
    tiles = image.reshape(channels, height // period, period, width // period, period)
    pattern = tiles.mean((1, 3))  # (C, period, period)
    energy, periodic = float(image.square().mean()), float(pattern.square().mean())
    return (periodic / energy if energy else 0.0), periodic**0.5


def lattice_figures(reconstructions: Tensor, stride: int) -> dict[str, float]:
    """`lattice` and `lattice_levels`, means over reconstructions (n, C, H, W) in [-1, 1]; empty
    where less than two periods are left within the borders."""
    border = LATTICE_BORDER * stride
    inner = [side - 2 * border for side in reconstructions.shape[2:]]
    if stride < 2 or min(inner) < 2 * stride:
        return {}
    height, width = (border + side // stride * stride for side in inner)
    parts = reconstructions[:, :, border:height, border:width]
    share, rms = torch.tensor([lattice_share(part, stride) for part in parts]).mean(0).tolist()
    return {"lattice": share, "lattice_levels": rms * 255 / 2}


class LatticeMetric:
    """Constant images through the model; each channel by itself and all together have each of
    LATTICE_LEVELS, other channels 0. Sides are those of the model's images, or longer where these
    have too few periods and the model takes any size."""

    def __init__(self, model: VAE, image_size: tuple[int, int], *, channels: int) -> None:
        self._model, self._size, self._channels = model, image_size, channels
        if model.image_size is None:
            fewest = (LATTICE_PERIODS + 2 * LATTICE_BORDER) * model.stride
            self._size = max(fewest, image_size[0]), max(fewest, image_size[1])
        self.reconstructions = torch.empty(0)  # float32 (n, C, H, W) in [-1, 1], after `compute`

    def update(self, batch: EvaluatedBatch) -> None:
        """The images of the data set tell nothing here."""

    @torch.inference_mode()
    def compute(self, runtime: Runtime) -> Report:
        device, outputs = next(self._model.parameters()).device, []
        shown = torch.ones(1, self._channels)
        if self._channels > 1:
            shown = torch.cat([torch.eye(self._channels), shown])
        for channels in shown:
            for level in LATTICE_LEVELS:
                image = (level * channels).view(1, -1, 1, 1).expand(-1, -1, *self._size).to(device)
                mean, _ = self._model.encode(image)
                params = self._model.decode(mean, self._size)
                outputs.append(self._model.likelihood.mean(params).float().cpu())
        self.reconstructions = torch.cat(outputs)
        if figures := lattice_figures(self.reconstructions, self._model.stride):
            return Report(figures)
        return Report(notes={"lattice": "lattice needs six periods of the stride in an image"})


# by figure: its function of normalised latents and labels, and why it may be nan
OF_LATENTS: dict[str, tuple[Callable[[Tensor, Sequence[int]], float], str]] = {
    "viv": (
        velocity_irreducible_variance,
        f"viv needs two images of a class and latents of at most {LARGEST_COVARIANCE} positions",
    ),
    "lnc": (nearest_class_accuracy, "lnc needs images of at least two classes with labels"),
    "sec": (lambda latents, _: high_frequency_share(latents), ""),
}


class LatentMetric:
    """Of the first latents of an evaluation, the same on any number of ranks."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = [name for name in OF_LATENTS if name in names]
        self._latents: dict[int, tuple[int, Tensor]] = {}  # by number: label, mean (C, h, w)

    def update(self, batch: EvaluatedBatch) -> None:
        samples, labels = batch.inputs.samples, batch.inputs.labels
        self.add(
            batch.output.mean, samples, [-1] * len(samples) if labels is None else labels.tolist()
        )

    def add(self, means: Tensor, samples: Sequence[int], labels: Sequence[int]) -> bool:
        """means (b, C, h, w) or (b, C) with the numbers and labels of their images, -1: none.
        False once no more are taken."""
        means = means if means.ndim == 4 else means[:, :, None, None]
        limit = SAMPLE_BYTES // (4 * means[0].numel())
        for mean, sample, label in zip(means, samples, labels, strict=True):
            if sample < limit:
                self._latents[sample] = label, mean.float().cpu()
        return max(samples) < limit

    def compute(self, runtime: Runtime) -> Report:
        for part in runtime.gather(self._latents):
            self._latents |= part
        return self.report()

    def report(self) -> Report:
        """Of the latents of this process."""
        found = [self._latents[number] for number in sorted(self._latents)]
        report = Report()
        ((shape, count),) = Counter(mean.shape for _, mean in found).most_common(1)
        labels = [label for label, mean in found if mean.shape == shape]
        latents = normalised(torch.stack([mean for _, mean in found if mean.shape == shape]))
        for name in self._names:
            function, reason = OF_LATENTS[name]
            value = function(latents, labels)
            if math.isnan(value):
                report.notes[name] = reason
            else:
                report.figures[name] = value
        if report.figures:
            words = f"{', '.join(report.figures)}: of the first {count} latents"
            report.notes["diffusability"] = f"{words} of {'x'.join(map(str, shape))}"
        return report
