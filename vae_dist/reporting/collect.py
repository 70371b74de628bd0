"""What a report shows of one run, read from its folder: also while the run goes on.

In: a run folder. Out: a `Story`: curves, distributions, pictures, config, sessions, results, all of
them plain values that JSON has words for. Long curves are thinned to the mean of neighbours.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_dist.config.keys import MISSING, flatten, keys, shown
from vae_dist.config.schema import TrainConfig
from vae_dist.reporting.frames import Frame, encode_frames
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.environment import read_sessions
from vae_dist.tracking.images import find_images, image_caption
from vae_dist.tracking.sinks import read_rows

MAX_POINTS = 800  # of a curve: what a screen can show
MAX_DISTRIBUTIONS = 60  # points in time

# In the order in which a page shows them; pictures of other names follow.
PICTURES = {
    "samples": ("Prior samples", "decoded from the same latents each time"),
    "reconstructions": ("Reconstructions", "each row of inputs stands above its reconstructions"),
    "interpolations": ("Interpolations", "straight ways in latent space; inputs at both ends"),
    "traversals": ("Traversals", "each row moves one of the most active latent units"),
    "by_class": ("By class", "inputs beside their reconstructions, one row for each label"),
    "worst": ("Worst reconstructions", "highest loss among the first validation images"),
}

Point = tuple[int, float]


@dataclass(frozen=True)
class Story:
    """`config` maps a key to (value, whether it is the schema's default)."""

    name: str
    folder: str
    status: dict[str, Any]
    steps: int  # that the run was asked for
    curves: dict[str, list[Point]]
    distributions: dict[str, list[tuple[int, list[float]]]]
    pictures: dict[str, list[Frame]]
    config: dict[str, tuple[str, bool]]
    sessions: list[dict[str, Any]]
    results: list[dict[str, Any]]  # of the run as it stands first


def short_names(paths: Sequence[Path]) -> list[str]:
    """The end of each path that no other one has: `seed_0`, or `a/seed_0` beside `b/seed_0`."""
    parts = [path.resolve().parts for path in paths]
    return [_shortest_end(own, set(parts) - {own}) for own in parts]


def _shortest_end(own: tuple[str, ...], others: set[tuple[str, ...]]) -> str:
    size = 1
    while size < len(own) and any(other[-size:] == own[-size:] for other in others):
        size += 1
    return str(Path(*own[-size:]))


def read_story(path: Path, *, picture_bytes: int, name: str = "") -> Story:
    """Raises ConfigError when `path` is no run folder. `name` is by default that of the folder."""
    folder = RunFolder(path)
    config = folder.config()
    rows = list(read_rows(folder.log_path))
    by_step = dict(rows)
    found = find_images(folder.images)
    ordered = {name: found[name] for name in [*PICTURES, *sorted(found)] if name in found}
    return Story(
        name=name or path.resolve().name,
        folder=str(path),
        status=folder.status(),
        steps=config.training.steps,
        curves={key: _thinned(points) for key, points in _curves(rows).items()},
        distributions={
            key: _every(values, MAX_DISTRIBUTIONS) for key, values in _lists(rows).items()
        },
        pictures=encode_frames(
            ordered,
            captions=lambda step: image_caption(step, by_step.get(step, {})),
            max_bytes=picture_bytes,
        ),
        config=_config(config),
        sessions=read_sessions(path / "environment.json"),
        results=_results([path / "results.json", *sorted(path.glob("results_*.json"))]),
    )


def _curves(rows: list[tuple[int, dict[str, Any]]]) -> dict[str, list[Point]]:
    curves: dict[str, list[Point]] = {}
    for step, row in rows:
        for key, value in row.items():
            if isinstance(value, (int, float)):
                curves.setdefault(key, []).append((step, float(value)))
    return curves


def _lists(rows: list[tuple[int, dict[str, Any]]]) -> dict[str, list[tuple[int, list[float]]]]:
    lists: dict[str, list[tuple[int, list[float]]]] = {}
    for step, row in rows:
        for key, value in row.items():
            if isinstance(value, list):
                lists.setdefault(key, []).append((step, value))
    return lists


def _thinned(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS, each the mean of neighbours at the step of the last of them."""
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return [(step, _short(value)) for step, value in points]
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(g[-1][0], _short(sum(value for _, value in g) / len(g))) for g in groups]


def _every(items: list[Any], count: int) -> list[Any]:
    """At most `count` items, evenly, the last always."""
    if len(items) <= count:
        return items
    places = {round(i * (len(items) - 1) / (count - 1)) for i in range(count)}
    return [items[place] for place in sorted(places)]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _config(config: TrainConfig) -> dict[str, tuple[str, bool]]:
    defaults = {name: key.default for name, key in keys(TrainConfig).items()}
    return {
        name: (shown(value), value == defaults[name] and defaults[name] != MISSING)
        for name, value in flatten(config).items()
    }


def _results(paths: list[Path]) -> list[dict[str, Any]]:
    """What `evaluate` wrote; not what is missing or being written."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            found.append(dict(json.loads(path.read_bytes(), parse_constant=_nothing)))
    return found


def _nothing(constant: str) -> None:
    """For NaN and infinities, which Python writes and JSON has no word for."""
