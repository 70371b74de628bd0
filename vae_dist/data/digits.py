"""The digits that ship with vae_dist, and the shards that `config=mnist` streams.

In: the gzipped idx files of `vae_dist/data/digits` (10,000 MNIST training digits).
Out: `<folder>/train` with 9,000 images in 8 shards and `<folder>/validation` with 1,000 in one,
100 of each class, both shuffled: members `NAME.png` and `NAME.cls`, with index.
"""

from __future__ import annotations

import gzip
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from vae_dist.config.errors import ConfigError
from vae_dist.data.writer import write_shards
from vae_dist.randomness import numpy_generator

NUM_TRAIN_SHARDS = 8
NUM_VALIDATION_PER_CLASS = 100


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (10000, 28, 28), 0 is paper and 255 ink, and labels uint8 (10000,).

    They are sorted by class.
    """
    return _read_idx("digits-images-idx3-ubyte.gz"), _read_idx("digits-labels-idx1-ubyte.gz")


def make_digits(folder: Path) -> None:
    """Write the digit shards into `folder`, unless it holds them.

    They appear at once, by the rename of a finished folder. Raises ConfigError when something else
    is in the way.
    """
    splits = folder / "train", folder / "validation"
    if all(split.is_dir() for split in splits):
        return
    images, labels = load_digits()
    counts = NUM_TRAIN_SHARDS, 1
    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
        for split, numbers, count in zip(splits, _stratified_split(labels), counts, strict=True):
            samples = _samples(images, labels, numbers)
            write_shards(samples, partial / split.name, num_shards=count, name=split.name)
        os.rename(partial, folder)
    except OSError as error:
        # another run may have finished the same folder first; its shards are these, byte for byte
        if all(split.is_dir() for split in splits):
            return
        raise ConfigError(
            f"data.bundled=digits: cannot write the digits to {folder} ({error}); run from a "
            "folder that you can write to, or set data.train and data.validation"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def idx_shape(head: bytes) -> tuple[tuple[int, ...], int]:
    """Shape and first byte of the array, after an idx file's first bytes. Raises ValueError."""
    num_axes = head[3] if len(head) > 3 else 0
    if head[:3] != b"\0\0\x08" or len(head) < 4 + 4 * num_axes:
        raise ValueError("is no idx file of unsigned bytes")
    return tuple(np.frombuffer(head, ">u4", num_axes, offset=4).tolist()), 4 + 4 * num_axes


def _read_idx(name: str) -> np.ndarray:
    data = gzip.decompress(files("vae_dist.data").joinpath("digits", name).read_bytes())
    shape, at = idx_shape(data)
    return np.frombuffer(data, np.uint8, offset=at).reshape(shape)


def _stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled sample numbers of the training and the validation part."""
    generator = numpy_generator(0, "digits")
    shuffled = generator.permutation(len(labels))
    validation = np.concatenate(
        [shuffled[labels[shuffled] == c][:NUM_VALIDATION_PER_CLASS] for c in range(10)]
    )
    train = shuffled[~np.isin(shuffled, validation)]
    return train, generator.permutation(validation)


def _samples(
    images: np.ndarray, labels: np.ndarray, numbers: np.ndarray
) -> Iterator[dict[str, str | bytes]]:
    for number in numbers:
        file = io.BytesIO()
        Image.fromarray(images[number]).save(file, "PNG", optimize=True)
        label = str(labels[number]).encode()
        yield {"__key__": f"{number:06d}", "png": file.getvalue(), "cls": label}
