"""TensorBoard files beside log.jsonl, for those who have a TensorBoard open already.

In: the rows and pictures that every sink gets. Out: event files in `folder`. Points past the step
at which a session begins are hidden by TensorBoard itself (`purge_step`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from vae_dist.config.errors import ConfigError
from vae_dist.tracking.metrics import Value


class TensorBoardSink:
    """Raises ConfigError where the package tensorboard is missing."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "log.tensorboard=true needs the package tensorboard: "
                "pip install 'vae_dist[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(self, step: int, row: Mapping[str, Value]) -> None:
        for key, value in row.items():
            if not isinstance(value, list):
                self._writer.add_scalar(key, value, step)
            elif (np.abs(value) < 1e20).any():  # TensorBoard's largest bin; an empty one raises
                self._writer.add_histogram(key, np.asarray(value), step)

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        pixels = np.asarray(Image.open(png_path).convert("RGB"))
        self._writer.add_image(key, pixels, step, dataformats="HWC")

    def close(self, status: str) -> None:
        self._writer.close()
