"""Forms of values that no type describes: sizes, shards, aspect buckets, and words with a grammar.

In: a value as YAML reads it. Out: whether it has the form, and for `prior` and `metrics` what it
asks for.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from vae_dist.config.keys import Form

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


def _is_label(value: Any) -> bool:
    return value in ("auto", "all", "none") or (type(value) is int and value >= 0)


_PRIOR = r"normal|gmm:([1-9][0-9]*)(?::(full|diagonal))?"
_NO_SHARDS = "is no folder of *.tar, brace pattern, URL or list of these"

SHARDS = Form(is_shards, _NO_SHARDS)
MIXTURE = Form(lambda value: is_shards(value) or is_mixture(value), _NO_SHARDS)
RESOLUTION = Form(
    lambda value: value == "native" or is_size(value) or is_buckets(value),
    "is none of N, [H, W], native and aspect buckets {area: PIXELS, multiple: PIXELS, max_aspect: "
    "RATIO} with area >= multiple^2 and max_aspect >= 1; try {area: 65536, multiple: 16, "
    "max_aspect: 2.0}",
)
WINDOW = Form(lambda v: v == "auto" or is_count(v), "is neither auto nor a count of samples")
BLOCKS = Form(
    lambda value: all(map(is_count, value if isinstance(value, list) else [value])),
    "must be a positive count, or one for each level",
)
MICROBATCH = Form(
    lambda value: value == "auto" or (type(value) is int and value >= 0),
    "is neither auto, nor 0, nor a count of images",
)
CHECKPOINT = Form(
    lambda value: re.fullmatch("latest|best|[0-9]+", value),
    "is none of latest, best and a step number",
)
LABEL = Form(_is_label, "is none of auto, all, none and a class 0, 1, ...")
SIZE = Form(lambda v: v == "trained" or is_size(v), "is none of trained, N and [H, W] in pixels")
ANY_SIZE = Form(
    lambda value: value in ("trained", "native") or is_size(value),
    "is none of trained, native, N and [H, W] in pixels",
)
PRIOR = Form(
    lambda value: re.fullmatch(_PRIOR, value),
    "is none of normal, gmm:K, gmm:K:full and gmm:K:diagonal; try prior=gmm:10",
)
SOME_METRICS = Form(
    lambda value: set(metric_names(value)) <= set(METRICS),
    f"is not one or several of {','.join(METRICS)}",
)
