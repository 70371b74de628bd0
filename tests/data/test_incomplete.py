"""Masks of samples, from the file to the batch: they stay where their image is.

That batches with masks do not depend on the layout is shown in `test_same_batches`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.conftest import png
from tests.support.picture_sources import encoded, npy
from vae_dist.config.schema import DataConfig
from vae_dist.data import (
    EvaluationStream,
    ShardIndex,
    TrainingStream,
    image_settings,
    load_index,
    write_shards,
)
from vae_dist.data.decode import decode_sample
from vae_dist.data.order import make_order
from vae_dist.data.tar import DamagedSampleError

SIZE = (12, 16)
NUM_IMAGES = 12
GREY = png(np.zeros((4, 4), np.uint8))


def pictures() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Grey images and masks; a missing pixel is white, an observed one is darker."""
    generator = np.random.default_rng(0)
    for _ in range(NUM_IMAGES):
        observed = np.ones(SIZE, bool)
        top, left = generator.integers(6), generator.integers(8)
        observed[top : top + 6, left : left + 8] = False
        pixels = generator.integers(0, 200, SIZE, dtype=np.uint8)
        yield np.where(observed, pixels, 255).astype(np.uint8), observed


def sample(kind: str, pixels: np.ndarray, observed: np.ndarray) -> dict[str, bytes]:
    if kind == "alpha":
        return {"png": png(np.stack([pixels, np.where(observed, 255, 90).astype(np.uint8)], 2))}
    if kind == "nan":
        return {"npy": npy(np.where(observed, pixels / 127.5 - 1, np.nan).astype(np.float32))}
    return {"png": png(pixels), "mask.png": png(np.where(observed, 255, 0).astype(np.uint8))}


@pytest.mark.parametrize("kind", ["member", "alpha", "nan"])
def test_a_sample_says_what_is_missing(kind: str) -> None:
    bits = 32 if kind == "nan" else 8
    for pixels, observed in pictures():
        files = sample(kind, pixels, observed)
        planes = decode_sample(files, channels=1, max_pixels=1000, bits=bits, mask=kind)
        assert planes.shape == (2, *SIZE) and planes.dtype == (np.float32 if bits == 32 else "u1")
        assert ((planes[1] == 1) == observed).all() and np.isfinite(planes).all()
        expected = (pixels / 127.5 - 1).astype(np.float32) if kind == "nan" else pixels
        assert (planes[0] == expected)[observed].all()


def test_colour_with_alpha_and_pictures_without_one() -> None:
    pixels, observed = next(pictures())
    coloured = np.stack([pixels, pixels // 2, pixels // 3], 2)
    alpha = np.where(observed, 255, 0).astype(np.uint8)
    files = {"png": png(np.concatenate([coloured, alpha[:, :, None]], 2))}
    planes = decode_sample(files, channels=3, max_pixels=1000, mask="alpha")
    assert ((planes[3] == 1) == observed).all()
    assert (planes[:3] == coloured.transpose(2, 0, 1))[:, observed].all()
    for files in ({"png": png(coloured)}, {"jpg": encoded(Image.fromarray(coloured), "JPEG")}):
        for mask in ("alpha", "member"):
            assert decode_sample(files, channels=3, max_pixels=1000, mask=mask)[3].all()


@pytest.mark.parametrize(
    ("files", "mask", "reason"),
    [
        ({"png": GREY, "mask.png": png(np.zeros((4, 5), np.uint8))}, "member", "4 x 5 .* 4 x 4"),
        ({"png": GREY, "mask.png": b"no png"}, "member", "readable PNG"),
        ({"png": GREY, "mask.png": b""}, "none", "set data.mask=member"),
        ({"png": GREY}, "nan", "a .png holds no NaN"),
        ({"npy": npy(np.full((4, 4), np.inf, np.float32))}, "nan", "lie in"),
        ({"npy": npy(np.full((4, 4), np.nan, np.float32))}, "none", "lie in"),
    ],
)
def test_masks_that_are_damage(files: dict[str, bytes], mask: str, reason: str) -> None:
    bits = 32 if "npy" in files else 8
    with pytest.raises(DamagedSampleError, match=reason):
        decode_sample(files, channels=1, max_pixels=1000, bits=bits, mask=mask)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("incomplete") / "s"
    samples = (
        {"__key__": f"{i:04d}", **sample("member", *picture)}
        for i, picture in enumerate(pictures())
    )
    write_shards(samples, folder, num_shards=2, name="images")
    return load_index(str(folder), key="data.train", create=True)


@pytest.mark.parametrize("resolution", ["native", [9, 9], [24, 24]])
def test_masks_follow_their_images_through_crop_mirror_and_resizing(
    index: ShardIndex, resolution: Any
) -> None:
    """A pixel that counts holds nothing of a missing one, which is white."""
    keys = {"crop": "random"} if resolution != "native" else {}
    keys |= {"mask": "member", "flip": True, "resolution": resolution}
    settings = image_settings(index, DataConfig(channels=1, max_pixels=10**6, **keys))
    order, seen = make_order(index, lanes=4, window=2, seed=1), 0
    for batch in TrainingStream(index, order, settings, batch_size=4, start_step=0, stop_step=6):
        (group,) = batch.groups
        assert group.masks is not None and group.masks.shape == (4, 1, *group.images.shape[2:])
        observed = group.masks > 0
        if resolution == "native":
            assert ((group.images == 255) == ~observed).all()
        # a cubic filter overshoots by less than a quarter of the range
        assert (group.images[observed] < 250).all()
        seen += int(observed.sum())
    assert seen > 500


def test_in_evaluation_a_drawn_mask_belongs_to_the_sample(tmp_path: Path) -> None:
    samples = ({"__key__": f"{i}", "png": GREY} for i in range(NUM_IMAGES))
    write_shards(samples, tmp_path / "s", num_shards=2)
    index = load_index(str(tmp_path / "s"), key="data.train", create=True)
    data = DataConfig(channels=1, max_pixels=1000, mask="random", mask_fraction=0.25)
    settings = image_settings(index, data)

    def masks(batch_size: int) -> torch.Tensor:
        stream = EvaluationStream(index, settings, batch_size=batch_size)
        return torch.cat([b.masks[b.weights > 0] for b in stream if b.masks is not None])

    assert torch.equal(masks(12), masks(5)) and len(masks(5).unique(dim=0)) > 1
    assert masks(12).float().mean() == pytest.approx(0.75, abs=0.08)
