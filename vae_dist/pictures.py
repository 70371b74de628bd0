"""The picture grids of a training run, under `images/` and in the sinks.

    samples          prior samples on fixed latents
    reconstructions  fixed validation images above their reconstructions
    interpolations   ways between pairs of validation images, which stand at both ends
    traversals       one image, with its most active latent units moved one at a time
    by_class         for each label, inputs beside their reconstructions; where there are labels
    worst            the worst reconstructions, by -ELBO, of the first validation images

The same images and the same latents each time, so that a reader sees the model change. The network
runs where the trainer calls; encoding and writing happen on a thread of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from PIL import Image
from torch import Tensor, nn

from vae_dist.config.schema import TrainConfig
from vae_dist.inference.load import Images, first_labelled_images
from vae_dist.inference.sampling import posteriors, sample_prior
from vae_dist.inference.walks import interpolate, kl_per_unit, traverse
from vae_dist.models.vae import VAE
from vae_dist.plan import Data
from vae_dist.runfolder import RunFolder
from vae_dist.tracking.background import Picture, PictureWriter
from vae_dist.tracking.history import picture_caption
from vae_dist.tracking.images import grid, side_by_side, to_uint8
from vae_dist.tracking.metrics import Value, format_number
from vae_dist.tracking.sinks import Sink

NUM_SEARCHED = 256  # validation images among which the worst and the classes are found
SEARCHED_BYTES = 2**27  # of these, for large images
NUM_WALKS = 8  # rows of interpolations and traversals
NUM_POINTS = 10  # images of a row
NUM_PAIRS = 5  # inputs of a class
MAX_CLASSES = 20


class RunPainter:
    """Callable for the main process: `(averaged model, step, metrics)`; the grids follow."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        data: Data,
        sinks: Iterable[Sink],
        *,
        say: Callable[[str], None] = print,
    ) -> None:
        self._config, self._data = config, data
        self._validation = Images(data.validation, data.settings.without_augmentation())
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._writer = PictureWriter(folder.images, sinks, say=say)

    def close(self) -> None:
        self._writer.close()

    @property
    def is_idle(self) -> bool:
        """Whether every picture so far is written."""
        return self._writer.is_idle

    @torch.inference_mode()
    def __call__(self, model: nn.Module, step: int, metrics: Mapping[str, Value]) -> None:
        assert isinstance(model, VAE)
        config, size, num_images = self._config, self._data.image_size, self._config.log.num_images
        batch_size = config.evaluation.batch_size
        caption = picture_caption(step, metrics)

        def show(name: str, image: Image.Image, note: str = "") -> None:
            self._writer.put(Picture(step, name, f"{caption} | {note}" if note else caption, image))

        samples = sample_prior(
            model, num_images, size, seed=config.seed, temperature=1.0, batch_size=batch_size
        )
        show("samples", grid(samples))
        inputs, labels = self._searched()
        mean, log_variance = posteriors(model, inputs, seed=config.seed, batch_size=batch_size)
        outputs, losses = _reconstructions(model, inputs, mean, batch_size)
        shown = max(1, num_images // 2)
        show("reconstructions", side_by_side(inputs[:shown], outputs[:shown]))
        walks = self._interpolations(model, inputs, mean)
        if walks is not None:
            show("interpolations", grid(walks, columns=NUM_POINTS))
        units = _most_active(kl_per_unit(mean, log_variance))
        ways = self._traversals(model, mean[0], units)
        names = ", ".join(f"{unit}" for unit in units)
        show("traversals", grid(ways, columns=NUM_POINTS), f"units {names}, from -3 to 3")
        classes = _by_class(inputs, outputs, labels)
        if classes is not None:
            show("by_class", grid(classes, columns=2 * NUM_PAIRS))
        losses = losses + kl_per_unit(mean, log_variance).sum(1)
        worst = losses.argsort(descending=True)[:shown].cpu()
        most, least = (format_number(float(losses[worst[i]])) for i in (0, -1))
        show(
            "worst",
            side_by_side(inputs[worst], outputs[worst]),
            f"worst {len(worst)} of {len(inputs)}: {most} to {least} nats",
        )

    def _searched(self) -> tuple[Tensor, Tensor]:
        """The first validation images and their labels, read once."""
        if self._inputs is None:
            fitting = SEARCHED_BYTES // self._data.num_dims
            wanted = max(1, self._config.log.num_images // 2, min(NUM_SEARCHED, fitting))
            self._inputs = first_labelled_images(self._validation, wanted)
        return self._inputs

    def _interpolations(self, model: VAE, inputs: Tensor, mean: Tensor) -> Tensor | None:
        """Rows of a, the way from a to b, b; None when there are no two images."""
        num_rows = min(NUM_WALKS, len(inputs) // 2)
        if num_rows == 0:
            return None
        first, second = slice(0, 2 * num_rows, 2), slice(1, 2 * num_rows, 2)
        size = self._data.image_size
        ways = interpolate(model, mean[first], mean[second], size, num_points=NUM_POINTS - 2)
        ways = ways.unflatten(0, (num_rows, NUM_POINTS - 2))
        ends = inputs[first].unsqueeze(1), inputs[second].unsqueeze(1)
        return torch.cat([ends[0], ways, ends[1]], 1).flatten(0, 1)

    def _traversals(self, model: VAE, z: Tensor, units: list[int]) -> Tensor:
        values = torch.linspace(-3, 3, NUM_POINTS)
        return traverse(model, z, self._data.image_size, units=units, values=values)


def _most_active(kl: Tensor) -> list[int]:
    """The units with the highest mean KL, best first; kl (N, U)."""
    order: list[int] = kl.mean(0).argsort(descending=True).tolist()
    return order[:NUM_WALKS]


def _reconstructions(
    model: VAE, inputs: Tensor, mean: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The means of p(x | z = E[z|x]), uint8 on CPU, and -log p(x|z) of each image in nats, without
    the noise of training."""
    height, width = inputs.shape[-2:]
    outputs, losses = [], []
    for images, z in zip(inputs.split(batch_size), mean.split(batch_size), strict=True):
        half = torch.full(images.shape, 0.5, device=z.device)
        params = model.decode(z, (height, width))
        outputs.append(to_uint8(model.likelihood.mean(params)).cpu())
        prepared = model.likelihood.prepare(images.to(z.device), half)
        losses.append(-model.likelihood.log_prob(params, prepared))
    return torch.cat(outputs), torch.cat(losses)


def _by_class(inputs: Tensor, outputs: Tensor, labels: Tensor) -> Tensor | None:
    """For each label a row of NUM_PAIRS inputs, each before its reconstruction; missing ones are
    grey. None without two labels."""
    classes = [label for label in labels.unique().tolist() if label >= 0][:MAX_CLASSES]
    if len(classes) < 2:
        return None
    rows = []
    for label in classes:
        found = (labels == label).nonzero().flatten()[:NUM_PAIRS]
        pairs = torch.stack([inputs[found], to_uint8(outputs[found])], 1).flatten(0, 1)
        lacking = inputs.new_full((2 * NUM_PAIRS - len(pairs), *inputs.shape[1:]), 112)
        rows.append(torch.cat([pairs, lacking]))
    return torch.cat(rows)
