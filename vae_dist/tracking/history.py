"""What a run has recorded so far: the rows of log.jsonl and the picture files, read back.

In: the run folder's files, also while the run goes on. Out: rows by step and picture paths by name
and step. Lines and names that are nothing of ours are passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vae_dist.tracking.metrics import format_number

_PICTURE = re.compile(r"(?P<name>.+)_(?P<step>\d{8,})\.png")
# JSON has no word for NaN and infinities, but Python's writers have
_DECODE = json.JSONDecoder(parse_constant=lambda constant: None).decode


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, row without "step") of each whole line; a value that was no number is None."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = _DECODE(line)
                step = row.pop("step")
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if isinstance(step, int):
                yield step, row


def find_pictures(folder: Path) -> dict[str, dict[int, Path]]:
    """name -> step -> PNG file, steps ascending."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        if match := _PICTURE.fullmatch(path.name):
            found.setdefault(match["name"], {})[int(match["step"])] = path
    return found


def picture_caption(step: int, metrics: Mapping[str, Any]) -> str:
    """`step 1500 | 94.12 nats | 0.1732 bits/dim`, with what `metrics` has of it."""
    words = [f"step {step}"]
    for key, unit in (("eval/neg_elbo_nats", "nats"), ("eval/bits_per_dim", "bits/dim")):
        value = metrics.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            words.append(f"{format_number(value)} {unit}")
    return " | ".join(words)
