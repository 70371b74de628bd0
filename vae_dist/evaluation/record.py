"""What `evaluate` writes: figures of one model on the same images, from one call or several.

In: the record of an evaluation, and the file that an earlier one left. Out: JSON in which figures
that this evaluation did not measure stand as they were, if they are of the same weights, images and
seed; `conditions` says of each figure what it rests on beside these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SAME = ("step", "weights", "weights_digest", "data_fingerprint", "seed", "precision", "mask")
COUNTS = ("num_images", "skipped_samples")


def conditions_of(
    figures: Iterable[str], *, importance_samples: int, prior: str
) -> dict[str, dict[str, Any]]:
    """By figure: how many draws it rests on, and which prior, where it is of any."""
    found: dict[str, dict[str, Any]] = {}
    for name in figures:
        if name.startswith("is_"):
            found.setdefault(name, {})["importance_samples"] = importance_samples
        if "gmm" in name:
            found.setdefault(name, {})["prior"] = prior
    return found


def with_earlier(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`record` and what the file at `path` has beyond it, if that is of the same evaluation."""
    merged = dict(record)
    earlier = _read(path)
    if any(earlier.get(key) != record[key] for key in SAME):
        return merged
    figures, before = record["figures"], earlier["figures"]
    if any(before.get(key) != figures[key] for key in COUNTS):
        return merged
    merged["figures"] = {**figures, **_beyond(before, figures)}
    for key in ("conditions", "notes"):  # both by figure
        merged[key] = {**record[key], **_beyond(earlier[key], {**figures, **record[key]})}
    merged["metric_weights"] = {**earlier["metric_weights"], **record["metric_weights"]}
    return merged


def as_json(record: Mapping[str, Any]) -> bytes:
    """Numbers that JSON has no word for become null."""
    return (json.dumps(_finite(record), indent=1, allow_nan=False) + "\n").encode()


def _read(path: Path) -> dict[str, Any]:
    """Empty where there is no such record."""
    try:
        earlier = dict(json.loads(path.read_bytes()))
        parts = [earlier[key] for key in ("figures", "conditions", "notes", "metric_weights")]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return earlier if all(isinstance(part, dict) for part in parts) else {}


def _beyond(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in before.items() if key not in now}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
