"""The image grids of a training run, under `images/` and in the sinks.

    samples          prior samples on fixed latents
    reconstructions  fixed validation images above their reconstructions
    interpolations   decoded lines between the means of pairs of validation images, at both ends
    traversals       one image, with its most active latent units moved one at a time
    by_class         for each label, inputs beside their reconstructions; where there are labels
    samples_by_class for each label a row of samples, of the same latents; conditional models
    worst            the worst reconstructions, by -ELBO, of the first validation images

The same images and the same latents each time, so that a reader sees the model change. The network
runs in the caller, evaluation.batch_size images at a time; PNGs are written by a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from PIL import Image
from torch import Tensor, nn

from vae_dist.config.schema import TrainConfig
from vae_dist.inference.load import Examples, Images, first_examples
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.latent import drawn_labels, kl_to_standard_normal
from vae_dist.models.vae import VAE
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.images import (
    ImageWriter,
    grid,
    image_caption,
    side_by_side,
    to_uint8,
    with_holes,
)
from vae_dist.tracking.metrics import Value, format_number
from vae_dist.tracking.sinks import Sink
from vae_dist.training.plan import Data

NUM_SEARCHED = 256  # validation images among which the worst and the classes are found
SEARCHED_BYTES = 2**27  # of these, for large images
NUM_ROWS = 8  # of interpolations and traversals
NUM_POINTS = 10  # images of a row
NUM_PAIRS = 5  # inputs of a class
MAX_CLASSES = 20


class ImageLogger:
    """Callable for the main process: `(averaged model, step, metrics)`."""

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
        self._batch_size = config.evaluation.batch_size
        self._validation = Images(data.validation, data.settings.at_one_size())
        self._inputs: Examples | None = None
        self._writer = ImageWriter(folder.images, sinks, say=say)

    def close(self) -> None:
        self._writer.close()

    @torch.inference_mode()
    def __call__(self, model: nn.Module, step: int, metrics: Mapping[str, Value]) -> None:
        assert isinstance(model, VAE)
        config, size, num_images = self._config, self._data.image_size, self._config.log.num_images
        vae = BatchedVAE(model, self._batch_size)
        caption = image_caption(step, metrics)

        def show(name: str, image: Image.Image, note: str = "") -> None:
            self._writer.put(step, name, f"{caption} | {note}" if note else caption, image)

        drawn = drawn_labels(model.num_classes, num_images, seed=config.seed)
        show("samples", grid(vae.sample(num_images, size, seed=config.seed, labels=drawn)))
        if model.num_classes:
            classes = range(min(model.num_classes, MAX_CLASSES))
            samples = vae.sample(NUM_POINTS, size, seed=config.seed, classes=classes)
            show("samples_by_class", grid(samples, columns=NUM_POINTS))
        inputs, labels, masks, _ = examples = self._examples()
        searched = f"first {len(inputs)} of {self._data.validation.num_samples} images"
        mean, log_variance = vae.encode(inputs, labels, masks)
        outputs, losses = _reconstructions(model, examples, mean, self._batch_size)
        inputs = with_holes(inputs, masks)
        shown = max(1, num_images // 2)
        levels, kl = to_uint8(inputs), kl_to_standard_normal(mean, log_variance)
        show("reconstructions", side_by_side(levels[:shown], outputs[:shown]))
        lines = _interpolations(vae, levels, labels, mean)
        if lines is not None:
            show("interpolations", grid(lines, columns=NUM_POINTS))
        units = kl.mean(0).argsort(descending=True).tolist()[:NUM_ROWS]
        values = torch.linspace(-3, 3, NUM_POINTS)
        traversed = vae.traverse(mean[0], size, units=units, values=values, label=int(labels[0]))
        names = ", ".join(f"{unit}" for unit in units)
        show("traversals", grid(traversed, columns=NUM_POINTS), f"units {names}, from -3 to 3")
        pairs = _by_class(levels, outputs, labels)
        if pairs is not None:
            show("by_class", grid(pairs, columns=2 * NUM_PAIRS), f"from the {searched}")
        losses = losses + kl.sum(1)
        worst = losses.argsort(descending=True)[:shown].cpu()
        most, least = (format_number(float(losses[worst[i]])) for i in (0, -1))
        show(
            "worst",
            side_by_side(levels[worst], outputs[worst]),
            f"worst {len(worst)} of the {searched}: {most} to {least} nats",
        )

    def _examples(self) -> Examples:
        """The first validation images, read once."""
        if self._inputs is None:
            fitting = SEARCHED_BYTES // self._data.num_dims
            wanted = max(1, self._config.log.num_images // 2, min(NUM_SEARCHED, fitting))
            self._inputs = first_examples(self._validation, wanted)
        return self._inputs


def _interpolations(vae: BatchedVAE, inputs: Tensor, labels: Tensor, mean: Tensor) -> Tensor | None:
    """Rows of a, the line from a to b, b; None when there are no two images."""
    num_rows, size = min(NUM_ROWS, len(inputs) // 2), (inputs.shape[-2], inputs.shape[-1])
    if num_rows == 0:
        return None
    first, second = slice(0, 2 * num_rows, 2), slice(1, 2 * num_rows, 2)
    ends = labels[first], labels[second]
    lines = vae.interpolate(mean[first], mean[second], size, num_points=NUM_POINTS - 2, labels=ends)
    lines = to_uint8(lines).unflatten(0, (num_rows, NUM_POINTS - 2))
    rows = [inputs[first].unsqueeze(1), lines, inputs[second].unsqueeze(1)]
    return torch.cat(rows, 1).flatten(0, 1)


def _reconstructions(
    model: VAE, examples: Examples, mean: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The means of p(x | z = E[z|x]), uint8 on CPU, and -log p(x|z) of each image in nats, without
    the noise of training."""
    height, width = examples.images.shape[-2:]
    outputs, losses = [], []
    for start in range(0, len(mean), batch_size):
        part = slice(start, start + batch_size)
        images, z = examples.images[part].to(mean.device), mean[part]
        mask = None if examples.masks is None else examples.masks[part].to(mean.device)
        half = torch.full(images.shape, 0.5, device=z.device)
        params = model.decode(z, (height, width), examples.labels[part].to(z.device))
        outputs.append(to_uint8(model.likelihood.mean(params)).cpu())
        losses.append(
            -model.likelihood.log_prob(params, model.likelihood.prepare(images, half), mask)
        )
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
