"""The picture grids of a training run, under `images/` and in the sinks.

Inputs above their reconstructions for the first validation images, and prior samples on fixed
latents: the same images and the same latents each time, so that a reader sees the model change.
"""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image
from torch import nn

from vae_dist.config.schema import TrainConfig
from vae_dist.inference.load import Images, first_images
from vae_dist.inference.sampling import reconstruct, sample_prior
from vae_dist.models.vae import VAE
from vae_dist.plan import Data
from vae_dist.runfolder import RunFolder
from vae_dist.tracking.images import grid, save_png, side_by_side
from vae_dist.tracking.sinks import Sink


class RunPainter:
    """Callable for the main process: `(averaged model, step)`, and the grids are written."""

    def __init__(
        self, config: TrainConfig, folder: RunFolder, data: Data, sinks: Iterable[Sink]
    ) -> None:
        self._config, self._folder, self._data = config, folder, data
        self._validation = Images(data.validation, data.settings.without_augmentation())
        self._sinks = list(sinks)

    def __call__(self, model: nn.Module, step: int) -> None:
        assert isinstance(model, VAE)
        config, num_images = self._config, self._config.log.num_images
        samples = sample_prior(
            model,
            num_images,
            self._data.image_size,
            seed=config.seed,
            temperature=1.0,
            batch_size=config.evaluation.batch_size,
        )
        self._show(grid(samples), step, "samples")
        inputs = first_images(self._validation, max(1, num_images // 2))
        outputs = reconstruct(
            model, inputs, seed=config.seed, batch_size=config.evaluation.batch_size
        )
        self._show(side_by_side(inputs, outputs), step, "reconstructions")

    def _show(self, picture: Image.Image, step: int, name: str) -> None:
        path = save_png(picture, self._folder.images / f"{name}_{step:08d}.png")
        for sink in self._sinks:
            sink.image(step, f"images/{name}", path, f"step {step}")
