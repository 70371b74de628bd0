"""The label of a sample: from its .cls member, or from a field of its .json member.

In: a webdataset sample and `data.label_key`, `cls` or the names of nested fields with dots between
them. Out: an integer, -1 where there is none: no such member, no such field, or null.

    .cls    an integer, -1 for none
    .json   an integer, true or false, or one of the two marks -1 and 1 of attribute lists such as
            CelebA's, which with two classes are the classes 0 and 1
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vae_dist.data.tar import DamagedSampleError

NO_LABEL = -1
CLS = "cls"


class UnknownClassError(ValueError):
    """A label that no class has: no damage, but a config that does not fit the data."""


def label_of(sample: Mapping[str, Any], *, key: str = CLS, num_classes: int = 0) -> int:
    """num_classes: 0 takes every integer.

    Raises DamagedSampleError for what is no integer, UnknownClassError for what is none of
    0, ..., num_classes - 1.
    """
    value = _of_member(sample) if key == CLS else _of_field(sample, key, num_classes)
    if value is None:
        return NO_LABEL
    if abs(value) >= 2**63:
        raise DamagedSampleError(f"the label {str(value)[:20]} is no integer of 64 bits")
    if num_classes and not (0 <= value < num_classes or (key == CLS and value == NO_LABEL)):
        raise UnknownClassError(
            f"its label {value} ({_source(key)}) is none of the classes 0 to {num_classes - 1} of "
            f"model.num_classes={num_classes}"
        )
    return value


def _source(key: str) -> str:
    return ".cls" if key == CLS else f".json field {key}"


def _of_member(sample: Mapping[str, Any]) -> int | None:
    text = sample.get("cls")
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise DamagedSampleError(f".cls is no integer: {bytes(text[:20])!r}") from None


def _of_field(sample: Mapping[str, Any], key: str, num_classes: int) -> int | None:
    text = sample.get("json")
    if text is None:
        return None
    try:
        value = json.loads(bytes(text))
    except (ValueError, RecursionError):
        raise DamagedSampleError(f".json is no JSON: {bytes(text[:20])!r}") from None
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        return None
    if not isinstance(value, int):  # bool is one
        raise DamagedSampleError(f".json field {key} is no integer: {str(value)[:20]!r}")
    if num_classes == 2 and value == -1:
        return 0
    return int(value)
