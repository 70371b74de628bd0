"""Picture grids over time, small enough to be carried inside a page.

In: PNG files by name and step. Out: the same as data URIs in WebP, exact while they fit into the
bytes that are given, then with losses, then with fewer points in time; the first and the last stay.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

MAX_FRAMES = 24  # of a grid
MAX_SIDE = 1400  # pixels; larger grids are made smaller, except by the first, exact try
_QUALITIES = (None, 80, 60, 40)  # None: lossless


class Frame(NamedTuple):
    step: int
    caption: str
    width: int
    height: int
    uri: str


def encode_frames(
    pictures: Mapping[str, Mapping[int, Path]],
    *,
    captions: Callable[[int], str],
    max_bytes: int,
) -> dict[str, list[Frame]]:
    """name -> frames, steps ascending. One frame of each name stays, whatever it weighs."""
    num_frames = MAX_FRAMES
    while True:
        for quality in _QUALITIES:
            found = {
                name: _encode(paths, captions, num_frames=num_frames, quality=quality)
                for name, paths in pictures.items()
            }
            size = sum(len(frame.uri) for frames in found.values() for frame in frames)
            if size <= max_bytes:
                return found
            if size > 4 * max_bytes and num_frames > 1:
                break  # no quality saves that much
        if num_frames == 1:
            return found
        num_frames //= 2


def _encode(
    paths: Mapping[int, Path],
    captions: Callable[[int], str],
    *,
    num_frames: int,
    quality: int | None,
) -> list[Frame]:
    frames = []
    for step in chosen(sorted(paths), num_frames):
        try:
            picture = Image.open(paths[step])
            picture.load()
        except OSError:  # the trainer may be writing it
            continue
        if quality is not None and max(picture.size) > MAX_SIDE:
            picture.thumbnail((MAX_SIDE, MAX_SIDE))
        buffer = io.BytesIO()
        if quality is None:
            picture.save(buffer, "WEBP", lossless=True, quality=50, method=3)
        else:
            picture.save(buffer, "WEBP", quality=quality, method=4)
        uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        frames.append(Frame(step, captions(step), *picture.size, uri))
    return frames


def chosen(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly, the last always and the first if there are two."""
    if len(steps) <= count:
        return steps
    if count == 1:
        return steps[-1:]
    places = {round(i * (len(steps) - 1) / (count - 1)) for i in range(count)}
    return [steps[place] for place in sorted(places)]
