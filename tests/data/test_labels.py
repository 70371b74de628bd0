"""Labels from .cls and .json members."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import UnknownClassError, label_of


@pytest.mark.parametrize(("text", "label"), [(b"7", 7), (b" 12\n", 12), (b"-1", -1), (None, -1)])
def test_the_cls_member(text: bytes | None, label: int) -> None:
    assert label_of({} if text is None else {"cls": text}) == label
    assert label_of({} if text is None else {"cls": text}, num_classes=13) == label


RECORD: dict[str, Any] = {
    "class": 3,
    "attributes": {"Smiling": -1, "Young": 1, "Male": True, "Bald": None},
    "name": "x",
}


@pytest.mark.parametrize(
    ("key", "num_classes", "label"),
    [
        ("class", 0, 3),
        ("class", 4, 3),
        ("attributes.Smiling", 2, 0),  # the marks -1 and 1 of an attribute list
        ("attributes.Young", 2, 1),
        ("attributes.Male", 2, 1),
        ("attributes.Bald", 2, -1),
        ("attributes.Hat", 2, -1),
        ("class.deeper", 2, -1),
    ],
)
def test_a_field_of_the_json_member(key: str, num_classes: int, label: int) -> None:
    sample = {"json": json.dumps(RECORD).encode(), "cls": b"9"}
    assert label_of(sample, key=key, num_classes=num_classes) == label
    assert label_of({"cls": b"9"}, key=key, num_classes=num_classes) == -1


@pytest.mark.parametrize(
    ("sample", "key", "reason"),
    [
        ({"cls": b"cat"}, "cls", ".cls is no integer: b'cat'"),
        ({"cls": b"99999999999999999999999"}, "cls", "64 bits"),
        ({"json": b"{"}, "class", ".json is no JSON"),
        ({"json": b"[" * 100_000}, "class", ".json is no JSON"),
        ({"json": b'{"class": 1.5}'}, "class", "field class is no integer: '1.5'"),
    ],
)
def test_what_is_no_label_is_damage(sample: dict[str, bytes], key: str, reason: str) -> None:
    with pytest.raises(DamagedSampleError, match=reason):
        label_of(sample, key=key)


@pytest.mark.parametrize(("value", "key"), [(10, "cls"), (-2, "cls"), (10, "class"), (-1, "class")])
def test_a_label_that_no_class_has(value: int, key: str) -> None:
    sample = {"cls": str(value).encode(), "json": json.dumps({"class": value}).encode()}
    with pytest.raises(UnknownClassError, match=f"its label {value}.*none of the classes 0 to 9"):
        label_of(sample, key=key, num_classes=10)
