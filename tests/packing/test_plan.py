from __future__ import annotations

from typing import Any

import pytest

from vae_dist.config.errors import ConfigError
from vae_dist.packing.items import Item
from vae_dist.packing.plan import Plan, make_plan


def plan(*items: Item) -> Plan:
    keys: dict[str, Any] = {"validation": 0, "shard_bytes": 1e6, "bytes_factor": 1.0}
    return make_plan(items, **keys, shuffle=True, seed=0, settings={})


ITEM = Item("a.png", 0, 10, None, 3, {"age": 4})


@pytest.mark.parametrize(
    "other",
    [
        ITEM._replace(extra={"age": 5}),
        ITEM._replace(category=4),
        ITEM._replace(companions=(("mask.png", Item("a.mask.png", 0, 7)),)),
    ],
)
def test_what_a_sample_says_is_part_of_the_identity(other: Item) -> None:
    assert plan(ITEM).identity == plan(ITEM._replace(place=1)).identity != plan(other).identity


def test_a_source_without_training_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match="all 1 pictures are of test; add some to train on"):
        plan(ITEM._replace(split="test"))
