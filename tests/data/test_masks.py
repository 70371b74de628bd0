"""Masks: how they are drawn, and how they follow their image through resizing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from vae_dist.data.transforms import DRAWN, draw_mask, resized_mask


def drawn(kind: str, *, fraction: float = 0.5, sample: int = 0, epoch: int = 0) -> np.ndarray:
    return draw_mask(kind, (28, 20), fraction, seed=3, epoch=epoch, sample=sample)


@pytest.mark.parametrize("kind", DRAWN)
def test_a_drawn_mask_belongs_to_seed_epoch_and_sample(kind: str) -> None:
    again = draw_mask(kind, (28, 20), 0.5, seed=3, epoch=0, sample=0)
    assert again.dtype == np.uint8 and again.shape == (1, 28, 20)
    assert (again == drawn(kind)).all()
    others = [drawn(kind, sample=s, epoch=e) for s in range(4) for e in range(4)]
    assert len({mask.tobytes() for mask in others}) >= 4
    assert {0, 1} == set(np.unique(again))


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["random", "rectangle"])
def test_the_fraction_is_that_of_missing_pixels(kind: str, fraction: float) -> None:
    missing = [1 - drawn(kind, fraction=fraction, sample=s).mean() for s in range(200)]
    assert np.mean(missing) == pytest.approx(fraction, abs=0.015)
    if kind == "rectangle":
        assert max(abs(m - fraction) for m in missing) < 0.06


def test_halves_are_the_four_sides() -> None:
    found = {drawn("half", sample=s).tobytes() for s in range(60)}
    assert len(found) == 4
    assert all(drawn("half", sample=s).mean() == 0.5 for s in range(60))


def test_rectangles_lie_anywhere() -> None:
    seen = sum(1 - drawn("rectangle", fraction=0.2, sample=s).astype(float) for s in range(400))
    assert (seen > 0).mean() > 0.99


@settings(max_examples=60, deadline=None)
@given(
    have=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    # torch 2.13 gives all rows of an image of one column the values of the first
    want=st.tuples(st.integers(1, 24), st.integers(2, 24)),
    seed=st.integers(0, 1000),
)
def test_what_counts_after_resizing_holds_nothing_of_missing_pixels(
    have: tuple[int, int], want: tuple[int, int], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    mask = np.ones((1, *have), np.uint8)
    for _ in range(generator.integers(1, 4)):
        mask[0, generator.integers(have[0]), generator.integers(have[1])] = 0
    image = torch.from_numpy(generator.random((1, 1, *have)))
    other = torch.where(torch.from_numpy(mask)[None] > 0, image, 1000.0)
    one, two = (
        interpolate(x, want, mode="bicubic", antialias=True)[0].numpy() for x in (image, other)
    )
    target = resized_mask(mask, want)
    assert target.shape == (1, *want)
    observed = target > 0
    assert np.allclose(one[observed], two[observed], rtol=0, atol=1e-9)


def test_no_pixel_is_lost_without_need() -> None:
    """Far from the hole every pixel is observed, and without a hole all are."""
    mask = np.ones((1, 40, 40), np.uint8)
    assert resized_mask(mask, (13, 9)).all()
    mask[0, :8, :8] = 0
    target = resized_mask(mask, (20, 20))
    assert not target[0, :4, :4].any() and target[0, 6:, :].all() and target[0, :, 6:].all()
