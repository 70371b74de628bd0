"""The Python API: a trained model as an object that takes and gives images.

Results are float32 tensors on the CPU. Nothing here changes torch's global state: TensorFloat-32 is
off inside a call and as it was after it, and draws come from generators of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vae_dist.config.commands import CheckpointCommand
from vae_dist.config.errors import ConfigError
from vae_dist.files import printable
from vae_dist.inference.load import LoadedModel, choose_device, load_model, load_published
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.diffusers import local_source
from vae_dist.models.latent import drawn_labels
from vae_dist.models.vae import NO_LABEL
from vae_dist.run.checkpoint import named_checkpoint
from vae_dist.training.compile import exact_float32

ImagesLike = Tensor | np.ndarray | Image.Image | Sequence[Any]
LabelsLike = int | Sequence[int] | Tensor | np.ndarray | None
Size = int | tuple[int, int] | None

PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by channels
STORED_TYPES = {16: torch.uint16, 32: torch.float32}  # by bits, else uint8


def load(
    path: str | Path,
    *,
    weights: Literal["ema", "model"] = "ema",
    checkpoint: str | int = "latest",
    device: str | torch.device = "auto",
) -> TrainedVAE:
    """Load a trained model.

    Args:
        path: a run folder (`runs/mnist`), one of its checkpoint folders
            (`runs/mnist/checkpoints/step_00001000`), a folder in diffusers' `AutoencoderKL` format,
            or `hf://OWNER/NAME[/SUBFOLDER]`, a repository of the Hugging Face Hub in that format.
        weights: `ema`, the averaged weights, or `model`, those of the last step.
        checkpoint: `latest`, `best`, or a step number; for a run folder.
        device: `auto`, which is CUDA if there is a device, or a torch device.

    Returns:
        A `TrainedVAE` in eval mode. Nothing that is loaded can run code.

    Raises:
        ConfigError: nothing at `path` can be loaded; the message says why. It is a ValueError.

    Example:
        >>> vae = vae_dist.load("runs/mnist")
        >>> images = vae.sample(64, seed=0)
    """
    chosen = choose_device(str(device))
    name = str(path)
    folder = local_source(name)
    checkpoints, step = named_checkpoint(folder)
    if step != "latest" and checkpoints.name == "checkpoints":
        if checkpoint != "latest":
            raise ConfigError(f"checkpoint={checkpoint}: {path} is a checkpoint; leave it out")
        folder, checkpoint = checkpoints.parent, int(step)
    if not (folder / "config.yaml").is_file() and (found := load_published(folder, chosen)):
        return TrainedVAE(found, has_likelihood=False)
    command = CheckpointCommand(run=str(folder), checkpoint=str(checkpoint), weights=weights)
    return TrainedVAE(load_model(command, device=chosen))


class TrainedVAE:
    """A trained VAE in eval mode. Make one with `vae_dist.load`.

    Images go in as a tensor or numpy array (N, C, H, W) or (C, H, W), as a Pillow image, or as a
    list of these of one size: unsigned integers over their whole range, or floats in [0, 1]. They
    are rounded to the levels that the model was trained on (`data.bits`). A conditional model takes
    `labels`: one class, or one for each image, -1 for none; without them it knows no label. Wrong
    shapes, ranges and labels are a ValueError.

    Attributes:
        model: the `torch.nn.Module`.
        config: the resolved config of the run.
        step: optimizer steps of the weights.
        image_size: (H, W) in pixels of the images of training.
        batch_size: images that go through the network at once; memory only.
    """

    batch_size = 64

    def __init__(self, loaded: LoadedModel, *, has_likelihood: bool = True) -> None:
        self.model, self.config, self.step, self.image_size = loaded
        self._has_likelihood = has_likelihood

    def __repr__(self) -> str:
        name = printable(Path(self.config.config).stem)
        images = "x".join(map(str, (self.config.data.channels, *self.image_size)))
        latents = "x".join(map(str, self.latent_shape()))
        of = f"step {self.step}, images {images}, latents {latents}"
        return f"TrainedVAE({name}, {of}, {self.device})"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def latent_shape(self, size: Size = None) -> tuple[int, ...]:
        """Shape of one image's latent: (d,), or (c, h, w) for images of `size` = (H, W)."""
        return self.model.latent_shape(*self._size(size))

    def sample(
        self,
        num_images: int,
        *,
        seed: int = 0,
        label: int | None = None,
        temperature: float | Sequence[float] = 1.0,
        size: Size = None,
    ) -> Tensor:
        """E[x|z] of draws of the prior, z = temperature * e with e ~ N(0, I); of a ladder one
        temperature for all levels, or one for each from the top.

        Image i is a function of (seed, i) alone. `label` is the class of all images, -1 for none;
        by default a conditional model's classes are drawn, all equally likely. `size` is N or
        (H, W) in pixels, for models with a spatial latent.

        Returns:
            float32 (num_images, C, H, W) in [0, 1].
        """
        if num_images < 1:
            raise ValueError(f"num_images={num_images}; give at least 1")
        drawn = drawn_labels(self.model.num_classes, num_images, seed=seed)
        known = drawn if label is None else self._labels(label, num_images)
        with self._exact() as vae:
            return _to_unit(
                vae.sample(
                    num_images, self._size(size), seed=seed, temperature=temperature, labels=known
                )
            )

    def encode(self, images: ImagesLike, *, labels: LabelsLike = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z|x), each float32 (N, *latent).

        The posterior of the very images: the noise that training adds to them (dequantisation,
        dynamic binarisation) is left out.
        """
        stored, known = self._inputs(images, labels)
        with self._exact() as vae:
            mean, log_variance = vae.encode(stored, known)
        return mean.cpu(), (0.5 * log_variance).exp().cpu()

    def decode(
        self, z: Tensor | np.ndarray, *, labels: LabelsLike = None, size: Size = None
    ) -> Tensor:
        """E[x|z] of latents (N, *latent), float32 (N, C, H, W) in [0, 1].

        `size` is N or (H, W) in pixels; by default the images of a spatial latent are as large as
        it allows.
        """
        z = torch.as_tensor(z).float()
        if size is None and self.model.image_size is None and z.ndim == 4:
            size = z.shape[2] * self.model.stride, z.shape[3] * self.model.stride
        size = self._size(size)
        if z.shape[1:] != self.latent_shape(size) or not len(z):
            wanted = ", ".join(map(str, self.latent_shape(size)))
            raise ValueError(f"latents of shape {tuple(z.shape)}; give (N, {wanted})")
        known = self._labels(labels, len(z))
        with self._exact() as vae:
            return _to_unit(vae.decode(z, size, known))

    def reconstruct(
        self, images: ImagesLike, *, labels: LabelsLike = None, levels: int | None = None
    ) -> Tensor:
        """E[x | z = E[z|x]] of each image, float32 (N, C, H, W) in [0, 1]; of a ladder with the
        latents of the top `levels` levels alone, the others at their prior's means."""
        stored, known = self._inputs(images, labels)
        with self._exact() as vae:
            return _to_unit(vae.reconstruct(stored, known, levels=levels))

    def neg_elbo(self, images: ImagesLike, *, labels: LabelsLike = None, seed: int = 0) -> Tensor:
        """-ELBO of each image, an upper bound of -log p(x), float64 (N,) in nats.

        One draw of z for each image, and what noise the likelihood needs, are functions of (seed,
        number of the image): for the first images of a data set these are the values that
        `vae_dist.evaluate` takes the mean of.
        """
        if not self._has_likelihood:
            raise ValueError("neg_elbo: diffusers' format has no likelihood; load a run folder")
        stored, known = self._inputs(images, labels)
        with self._exact() as vae:
            return vae.neg_elbo(stored, known, seed=seed)

    @contextmanager
    def _exact(self) -> Iterator[BatchedVAE]:
        with exact_float32():
            yield BatchedVAE(self.model, self.batch_size)

    def _size(self, size: Size) -> tuple[int, int]:
        if size is None:
            size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        self.model.latent_shape(height, width)  # ValueError for another size of a vector latent
        return height, width

    def _labels(self, labels: LabelsLike, count: int) -> Tensor | None:
        """int64 (count,); None where there are none. Raises ValueError."""
        if labels is None:
            return None
        num_classes = self.model.num_classes
        if not num_classes:
            raise ValueError("labels: this model was trained without labels; leave them out")
        found = torch.as_tensor(labels).long()
        found = found.expand(count) if found.ndim == 0 else found
        if found.shape != (count,) or found.min() < NO_LABEL or found.max() >= num_classes:
            known = f"classes 0 to {num_classes - 1}, and -1 for none"
            raise ValueError(f"labels={labels} for {count} images; give one, or one each: {known}")
        return found

    def _inputs(self, images: ImagesLike, labels: LabelsLike) -> tuple[Tensor, Tensor | None]:
        """(N, C, H, W) as the shards of training hold them, and their labels. Raises ValueError."""
        channels, bits = self.config.data.channels, self.config.data.bits
        found = _as_tensor(images, channels)
        if found.ndim != 4 or found.shape[1] != channels or not found.numel():
            shape = tuple(found.shape)
            raise ValueError(f"images of shape {shape}; give (N, {channels}, H, W) or one image")
        self._size((found.shape[2], found.shape[3]))
        known, wanted = self._labels(labels, len(found)), STORED_TYPES.get(bits, torch.uint8)
        if wanted == torch.float32:
            found = _in_unit(found) * 2 - 1
        elif found.dtype != wanted:
            found = (_in_unit(found) * torch.iinfo(wanted).max).round().to(wanted)
        return found, known


def _as_tensor(images: ImagesLike, channels: int) -> Tensor:
    """(N, C, H, W) of any dtype. Raises ValueError."""
    if isinstance(images, Image.Image):
        is_deep = images.mode.startswith(("I", "F"))
        mode = images.mode if is_deep else PILLOW_MODES.get(channels, images.mode)
        pixels = np.atleast_3d(np.array(images.convert(mode)))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if isinstance(images, Tensor | np.ndarray):
        found = torch.as_tensor(images).detach().cpu()
        return found[None] if found.ndim == 3 else found
    parts = [_as_tensor(image, channels) for image in images]
    if len({part.shape[1:] for part in parts}) != 1:
        raise ValueError("a list of images: give at least one, and all of one size")
    return torch.cat(parts)


def _in_unit(images: Tensor) -> Tensor:
    """float32 in [0, 1]. Raises ValueError."""
    if images.dtype in (torch.uint8, torch.uint16):
        return images.float() / torch.iinfo(images.dtype).max
    if not images.dtype.is_floating_point:
        raise ValueError(f"images of {images.dtype}; give uint8, uint16, or floats in [0, 1]")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # NaN too
        hint = "; images in [-1, 1] are (images + 1) / 2" if low >= -1 and high <= 1 else ""
        raise ValueError(f"float images from {low:g} to {high:g}; they must be in [0, 1]{hint}")
    return images.float()


def _to_unit(means: Tensor) -> Tensor:
    return ((means + 1) / 2).clamp(0, 1)
