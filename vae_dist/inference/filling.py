"""From incomplete images of shards or of a folder to filled ones, image by image.

In: a VAE and images with masks. Out: `Filled`, in the stored values' own scale (0 to 255, 0 to
65535, or floats in [-1, 1]), observed pixels exactly as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import MASK_MEMBER, SUFFIXES
from vae_dist.data.reader import SampleReader, single_sample
from vae_dist.data.transforms import DRAWN
from vae_dist.data.writer import write_shards
from vae_dist.inference.imputation import Incomplete, impute
from vae_dist.inference.load import Examples, Images, first_examples_by_shape
from vae_dist.models.vae import VAE
from vae_dist.tracking.images import file_name, to_uint8, with_holes


@dataclass(frozen=True)
class Filled:
    """One image. Arrays are (C, H, W), draws (J, C, H, W)."""

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
    model: VAE,
    images: Images,
    *,
    bits: int,
    names: Sequence[str] | None,
    num_images: int,
    method: str,
    num_samples: int,
    num_draws: int,
    seed: int,
    chunk: int,
) -> list[Filled]:
    """The readable ones among the first `num_images`, in their order. `names`: what to call them
    instead of their keys. Raises ConfigError when there is none."""
    scale = {16: 65535 / 2, 32: 1.0}.get(bits, 255 / 2)
    filled: dict[int, Filled] = {}
    for examples in first_examples_by_shape(images, num_images):
        known = known_of(model, examples)
        imputed = impute(
            model,
            known,
            method=method,
            num_samples=num_samples,
            num_draws=num_draws,
            seed=seed,
            chunk=chunk,
        )
        assert examples.masks is not None
        shift = 0.0 if bits == 32 else 1.0
        for i, sample in enumerate(known.samples):
            stored, observed = _as_float(examples.images[i]), examples.masks[i].numpy() > 0
            key = names[sample] if names is not None else _key(images, sample)
            filled[sample] = Filled(
                name=file_name(sample, key),
                key=key,
                stored=examples.images[i],
                mask=examples.masks[i],
                truth_is_known=images.settings.mask in DRAWN,
                mean=np.where(observed, stored, (imputed.mean[i].numpy() + shift) * scale),
                deviation=np.where(observed, 0.0, imputed.deviation[i].numpy() * scale),
                draws=np.where(observed, stored, (imputed.draws[i].numpy() + shift) * scale),
                effective_samples=float(imputed.effective_samples[i]),
                scale=scale,
            )
    return [filled[sample] for sample in sorted(filled)]


def known_of(model: VAE, examples: Examples) -> Incomplete:
    """What the model is told. Noise that training adds to images is replaced by its middle: grey
    levels are binarised at one half and dequantised in the middle of their bins."""
    device = next(model.parameters()).device
    stored = examples.images.to(device)
    half = torch.full(stored.shape, 0.5, device=device)
    assert examples.masks is not None
    return Incomplete(
        model.likelihood.prepare(stored, half if model.likelihood.needs_uniform else None),
        examples.masks.to(device),
        examples.labels.to(device),
        examples.samples.tolist(),
    )


def _as_float(stored: Tensor) -> np.ndarray:
    values: np.ndarray = stored.numpy().astype(np.float32)
    return values


def _key(images: Images, sample: int) -> str:
    """The key of a sample in its shard."""
    index = images.index
    ends = np.cumsum(index.lengths)
    shard = int(np.searchsorted(ends, sample, "right"))
    place = sample - int(ends[shard] - index.lengths[shard])
    data = SampleReader(index, images.settings, seed=0).read(shard, place, place + 1)[0]
    key: str = single_sample(data, index.paths[shard])["__key__"]
    return key


# a folder of pictures


def is_folder_of_pictures(path: str) -> bool:
    folder = Path(path)
    return folder.is_dir() and not any(folder.glob("*.tar")) and bool(_pictures(folder))


def shards_of_pictures(
    folder: Path, out: Path, num_pictures: int
) -> tuple[str, list[str], Literal["member", "alpha"]]:
    """Writes the first pictures, by name, with their masks as shards. Returns these, the names of
    the pictures and the kind of their masks: member where one has a NAME.mask.png, else alpha."""
    pictures = _pictures(folder)[:num_pictures]
    masks = {path: path.with_name(f"{path.stem}.{MASK_MEMBER}") for path in pictures}
    has_masks = any(mask.is_file() for mask in masks.values())

    def samples() -> Iterator[dict[str, str | bytes]]:
        for number, path in enumerate(pictures):
            sample: dict[str, str | bytes] = {"__key__": f"{number:06d}"}
            sample[path.suffix.lower()[1:]] = path.read_bytes()
            if masks[path].is_file():
                sample[MASK_MEMBER] = masks[path].read_bytes()
            yield sample

    try:
        write_shards(samples(), out, num_shards=1)
    except OSError as error:
        raise ConfigError(f"data={folder}: cannot be read ({error})") from None
    return str(out), [path.stem for path in pictures], "member" if has_masks else "alpha"


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower()[1:] in SUFFIXES
        and not path.name.endswith(f".{MASK_MEMBER}")
        and path.is_file()
    )
