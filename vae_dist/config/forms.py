"""Forms of values that no type describes: sizes, shards, aspect buckets, and words with a grammar.

In: a value as YAML reads it. Out: whether it has the form, and for `prior` and `metrics` what it
asks for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from vae_dist.config.keys import shown

METRICS = ("psnr", "ssim", "ms_ssim", "lpips", "lpips_alex", "rfid", "fid")


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 1  # true is no count


def is_size(value: Any) -> bool:
    """N or [H, W]."""
    pair = isinstance(value, list) and len(value) == 2 and all(map(is_count, value))
    return pair or is_count(value)


def is_shards(value: Any) -> bool:
    """A path, a list of these, or {path: SHARDS, index: FOLDER}."""
    if isinstance(value, dict):
        return set(value) == {"path", "index"} and all(map(is_shards, value.values()))
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and item.strip() for item in items)


def is_mixture(value: Any) -> bool:
    """[{path: SHARDS, weight: NUMBER}, ...]; a weight may be left away."""
    parts = value if isinstance(value, list) else []
    return bool(parts) and all(
        isinstance(part, dict)
        and set(part) <= {"path", "index", "weight"}
        and is_shards(part.get("path"))
        and isinstance(part.get("index", ""), str)
        and isinstance(part.get("weight", 1), int | float)
        and 0 < part.get("weight", 1) < math.inf
        for part in parts
    )


def is_buckets(value: Any) -> bool:
    """{area: PIXELS, multiple: PIXELS, max_aspect: longer side / shorter side}."""
    if not isinstance(value, dict) or set(value) != {"area", "multiple", "max_aspect"}:
        return False
    area, multiple, aspect = value["area"], value["multiple"], value["max_aspect"]
    whole = is_count(area) and is_count(multiple) and area >= multiple * multiple
    return whole and isinstance(aspect, int | float) and 1 <= aspect < math.inf


class MixturePrior(NamedTuple):
    """What prior=gmm:K asks for; covariance is full, diagonal or empty (by the size of latents)."""

    num_components: int
    covariance: str


def mixture_prior(prior: str) -> MixturePrior | None:
    """None for prior=normal."""
    match = re.fullmatch(_PRIOR, prior)
    return MixturePrior(int(match[1]), match[2] or "") if match and match[1] else None


def metric_names(value: Any) -> list[str]:
    """What evaluate's `metrics` asks for: a word, words with commas between them, or a list."""
    items = value if isinstance(value, list) else str(value or "").split(",")
    return [str(item).strip() for item in items if str(item).strip()]


def is_prior(value: Any) -> bool:
    return re.fullmatch(_PRIOR, value) is not None


def is_metrics(value: Any) -> bool:
    return set(metric_names(value)) <= set(METRICS)


_PRIOR = r"normal|gmm:([1-9][0-9]*)(?::(full|diagonal))?"

# What stands in a knob's `form` beside plain words: a test, and what a value that fails it is not.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "COUNT": (is_count, "a count 1, 2, ..."),
    "COUNTS": (lambda v: isinstance(v, list) and all(map(is_count, v)), "a list of counts"),
    "CLASS": (lambda v: type(v) is int and v >= 0, "a class 0, 1, ..."),
    "STEP": (lambda v: v.isascii() and v.isdigit(), "a step number"),
    "SIZE": (is_size, "N or [H, W] in pixels"),
    "BUCKETS": (
        is_buckets,
        "aspect buckets {area: 65536, multiple: 16, max_aspect: 2.0} with area >= multiple^2 and "
        "max_aspect >= 1",
    ),
    "SHARDS": (is_shards, "a folder of *.tar, brace pattern, URL, list of these"),
    "MIXTURE": (is_mixture, "[{path: SHARDS, weight: NUMBER}, ...]"),
    "PRIOR": (is_prior, "normal, gmm:K, gmm:K:full, gmm:K:diagonal; try prior=gmm:10"),
    "METRICS": (is_metrics, f"one or several of {','.join(METRICS)}"),
}


def form_problem(form: str, value: Any) -> str:
    """Why the value is none of the words and kinds of the form; empty when it is one."""
    parts = form.split()
    if any(KINDS[p][0](value) if p in KINDS else p == shown(value) for p in parts):
        return ""
    return f"is none of {', '.join(KINDS[part][1] if part in KINDS else part for part in parts)}"
