"""Aspect buckets: the sizes that images of any shape are brought to, and which images go together.

In: `{area: pixels, multiple: pixels, max_aspect: ratio}`. Out: the buckets, sizes (H, W) whose
sides are multiples of `multiple` and not longer than max_aspect times each other, as large as fits
into `area`; and for a window of images an order in which slots of neighbours share a bucket.

An aspect is log(W / H), so that upright and lying images count alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Size = tuple[int, int]  # (H, W), pixels

JITTER = 0.05  # of an aspect before sorting, so that neighbours vary from epoch to epoch


def make_buckets(*, area: int, multiple: int, max_aspect: float) -> tuple[Size, ...]:
    """Sizes (H, W) from upright to lying; empty where not even one square fits."""
    found: list[Size] = []
    for height in range(multiple, area // multiple + 1, multiple):
        longest = min(area / height, max_aspect * height + 1e-9)
        width = int(longest // multiple) * multiple
        if width and height <= max_aspect * width + 1e-9:
            found.append((height, width))
    # of sizes that fit into another one, only the largest
    return tuple(
        (h, w)
        for h, w in reversed(found)
        if not any((h, w) != (a, b) and h <= a and w <= b for a, b in found)
    )


def aspect(size: Size) -> float:
    return math.log(size[1] / size[0])


def nearest(buckets: Sequence[Size], aspect_wanted: float) -> Size:
    """The bucket of the nearest aspect; of two, the more upright one."""
    return min(buckets, key=lambda size: abs(aspect(size) - aspect_wanted))


def arrange(
    sizes: Sequence[Size | None],
    buckets: Sequence[Size],
    *,
    slot_rows: int,
    generator: np.random.Generator,
) -> tuple[np.ndarray, list[Size]]:
    """The order in which a window's images are shown, and the bucket of each slot of slot_rows.

    Images are sorted by jittered aspect and cut into slots; a slot takes the bucket nearest the
    median of its aspects; the slots are shuffled. Images whose size cannot be read (None) stand in
    the middle: what replaces them takes the shape of their slot.
    """
    assert len(sizes) % slot_rows == 0, (len(sizes), slot_rows)
    known = [aspect(size) for size in sizes if size is not None]
    middle = float(np.median(known)) if known else 0.0
    aspects = np.array([middle if size is None else aspect(size) for size in sizes])
    jittered = aspects + generator.uniform(-JITTER, JITTER, len(aspects))
    slots = np.argsort(jittered, kind="stable").reshape(-1, slot_rows)
    slots = slots[generator.permutation(len(slots))]
    chosen = [nearest(buckets, float(np.median(aspects[slot]))) for slot in slots]
    return slots.reshape(-1), chosen
