"""The image grids of a training run, under `images/` and in the sinks.

    samples          prior samples on fixed latents
    reconstructions  fixed validation images above their reconstructions
    interpolations   decoded lines between the means of pairs of validation images, at both ends
    traversals       one image, with its most active latent units moved one at a time
    levels           instead, of a ladder: images, what the top level holds, the top two, ..., all
    by_class         for each label, inputs beside their reconstructions; where there are labels
    samples_by_class for each label a row of samples, of the same latents; conditional models
    worst            the worst reconstructions, by -ELBO, of the first validation images

The same images and the same latents each time, so that a reader sees the model change. The network
sees evaluation.batch_size images at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from vae_dist.config.schema import TrainConfig
from vae_dist.data.loader import EvaluationBatch
from vae_dist.inference.load import Images, first_examples_by_shape
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.latent import drawn_labels, kl_to_standard_normal
from vae_dist.models.vae import VAE
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.images import (
    grid,
    image_caption,
    save_png,
    side_by_side,
    to_uint8,
    with_holes,
)
from vae_dist.tracking.metrics import Value, format_number
from vae_dist.tracking.sinks import Sink
from vae_dist.training.data import Data

NUM_SEARCHED = 256  # validation images among which the worst and the classes are found
SEARCHED_BYTES = 2**27  # of these, for large images
NUM_ROWS = 8  # of interpolations and traversals
NUM_POINTS = 10  # images of a row
NUM_PAIRS = 5  # inputs of a class
MAX_CLASSES = 20


class ImageLogger:
    """Callable for the main process: `(averaged model, step, metrics)`."""

    def __init__(
        self, config: TrainConfig, folder: RunFolder, data: Data, sinks: Iterable[Sink]
    ) -> None:
        self._config, self._data = config, data
        self._folder, self._sinks = folder.images, sinks

    def __call__(self, model: VAE, step: int, metrics: Mapping[str, Value]) -> None:
        caption = image_caption(step, metrics)
        with torch.inference_mode():
            for name, image, note in self._grids(model):
                path = save_png(image, self._folder / f"{name}_{step:08d}.png")
                for sink in self._sinks:
                    sink.image(step, f"images/{name}", path, caption + f" | {note}" * bool(note))

    @cached_property
    def _examples(self) -> EvaluationBatch:
        """The first validation images, read once."""
        fitting = SEARCHED_BYTES // self._data.num_dims
        wanted = max(1, self._config.log.num_images // 2, min(NUM_SEARCHED, fitting))
        settings = self._data.settings.at_one_size()
        images = Images(self._data.validation, settings, self._config.data.retry_s)
        return first_examples_by_shape(images, wanted)[0]

    def _grids(self, model: VAE) -> Iterator[tuple[str, Image.Image, str]]:
        """Name, grid and what to say of it."""
        seed, num_images = self._config.seed, self._config.log.num_images
        size, shown = self._data.image_size, max(1, num_images // 2)
        vae = BatchedVAE(model, self._config.evaluation.batch_size)
        drawn = drawn_labels(model.num_classes, num_images, seed=seed)
        yield "samples", grid(vae.sample(num_images, size, seed=seed, labels=drawn)), ""
        if model.num_classes:
            classes = range(min(model.num_classes, MAX_CLASSES))
            samples = vae.sample(NUM_POINTS, size, seed=seed, classes=classes)
            yield "samples_by_class", grid(samples, columns=NUM_POINTS), ""
        examples = self._examples
        stored, labels, masks = examples.images, examples.labels, examples.masks
        mean, log_variance = vae.encode(stored, labels, masks)
        outputs, losses = _reconstructions(vae, examples, mean, log_variance)
        inputs = to_uint8(with_holes(stored, masks))
        yield "reconstructions", side_by_side(inputs[:shown], outputs[:shown]), ""
        if num_rows := min(NUM_ROWS, len(inputs) // 2):
            first, second = (slice(start, 2 * num_rows, 2) for start in (0, 1))
            ends, points = (labels[first], labels[second]), NUM_POINTS - 2
            line = vae.interpolate(mean[first], mean[second], size, num_points=points, labels=ends)
            lines = to_uint8(line).unflatten(0, (num_rows, points))
            rows = [inputs[first].unsqueeze(1), lines, inputs[second].unsqueeze(1)]
            yield "interpolations", grid(torch.cat(rows, 1).flatten(0, 1), columns=NUM_POINTS), ""
        if model.num_levels:
            few, counts = slice(0, NUM_POINTS), range(1, model.num_levels + 1)
            rows = [to_uint8(vae.decode(mean[few], size, labels[few], levels=n)) for n in counts]
            yield "levels", grid(torch.cat([inputs[few], *rows]), columns=len(rows[0])), ""
        else:
            kl = kl_to_standard_normal(mean, log_variance)
            units = kl.mean(0).argsort(descending=True).tolist()[:NUM_ROWS]
            values, label = torch.linspace(-3, 3, NUM_POINTS), int(labels[0])
            moved = vae.traverse(mean[0], size, units=units, values=values, label=label)
            names = ", ".join(f"{unit}" for unit in units)
            yield "traversals", grid(moved, columns=NUM_POINTS), f"units {names}, from -3 to 3"
        searched = f"first {len(inputs)} of {self._data.validation.num_samples} images"
        if (pairs := _by_class(inputs, outputs, labels)) is not None:
            yield "by_class", grid(pairs, columns=2 * NUM_PAIRS), f"from the {searched}"
        worst = losses.argsort(descending=True)[:shown].cpu()
        most, least = (format_number(float(losses[worst[i]])) for i in (0, -1))
        note = f"worst {len(worst)} of the {searched}: {most} to {least} nats"
        yield "worst", side_by_side(inputs[worst], outputs[worst]), note


def _reconstructions(
    vae: BatchedVAE, examples: EvaluationBatch, mean: Tensor, log_variance: Tensor
) -> tuple[Tensor, Tensor]:
    """The means of p(x | z = E[z|x]), uint8 on CPU, and -ELBO of each image at this z in nats,
    without the noise of training."""
    model, likelihood = vae.model, vae.model.likelihood
    outputs, losses = [], []
    for start in range(0, len(mean), vae.batch_size):
        part = slice(start, start + vae.batch_size)
        images, z = examples.images[part].to(mean.device), mean[part]
        mask = None if examples.masks is None else examples.masks[part].to(mean.device)
        half = torch.full(images.shape, 0.5, device=z.device)
        size, labels = (images.shape[-2], images.shape[-1]), examples.labels[part].to(z.device)
        params = model.decode(z, size, labels)
        outputs.append(to_uint8(likelihood.mean(params)).cpu())
        kl = kl_to_standard_normal(z, log_variance[part])
        if model.num_levels:  # on the path of the means
            kl = model(likelihood.noise_free(images), torch.zeros_like(z), labels, mask).kl
        found = likelihood.log_prob(params, likelihood.prepare(images, half), mask)
        losses.append(kl.sum(1) - found)
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
        pairs = torch.stack([inputs[found], outputs[found]], 1).flatten(0, 1)
        lacking = inputs.new_full((2 * NUM_PAIRS - len(pairs), *inputs.shape[1:]), 112)
        rows.append(torch.cat([pairs, lacking]))
    return torch.cat(rows)
