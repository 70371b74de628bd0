from __future__ import annotations

import pytest

from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.packing.items import Item
from vae_dist.packing.pack import _digest, make_plan

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
    assert _digest([ITEM]) == _digest([ITEM._replace(place=1)]) != _digest([other])


def test_a_source_without_training_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match="all 1 pictures are of test; add some to train on"):
        make_plan([ITEM._replace(split="test")], PackCommand(), bytes_factor=1.0)
