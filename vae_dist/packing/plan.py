"""Which picture goes into which shard: decided before the first one is written.

In: the items of a source and a seed. Out: for each split its shards, each a list of items. The plan
depends on the source and the settings alone, so that a killed `pack` goes on where it stopped and
the jobs of an array agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.packing.items import Item
from vae_dist.randomness import numpy_generator

MIN_SHARDS = 8  # of a split that has at least MIN_PER_SHARD pictures for each
MIN_PER_SHARD = 128
SPLIT_ORDER = ("train", "validation", "test")


@dataclass(frozen=True)
class PlannedShard:
    split: str
    number: int  # in the split
    first: int  # number of its first picture in the split, for the keys
    items: list[Item]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}.tar"


@dataclass(frozen=True)
class Plan:
    identity: str  # of source and settings: another plan does not go on with this one's shards
    shards: list[PlannedShard]

    def num_items(self, split: str | None = None) -> int:
        return sum(len(s.items) for s in self.shards if split in (None, s.split))

    @property
    def splits(self) -> list[str]:
        return [split for split in SPLIT_ORDER if any(s.split == split for s in self.shards)]

    def of(self, split: str) -> list[PlannedShard]:
        return [shard for shard in self.shards if shard.split == split]


def make_plan(
    items: Sequence[Item],
    *,
    validation: float,
    shard_bytes: float,
    bytes_factor: float,
    shuffle: bool,
    seed: int,
    settings: dict[str, Any],
) -> Plan:
    """Deal the items. bytes_factor: bytes of a picture in a shard over its bytes in the source.

    validation: part (below 1) or number of the training pictures that are set aside where the
    source has no validation pictures. Raises ConfigError when nothing is left to train on.
    """
    digest = hashlib.blake2b(repr(sorted(settings.items())).encode(), digest_size=16)
    for item in items:
        companions = [(member, file.name, file.num_bytes) for member, file in item.companions]
        digest.update(repr((*item._replace(place=None)[:-1], companions)).encode())
    splits: dict[str, list[Item]] = {}
    for item in items:
        splits.setdefault(item.split or "train", []).append(item)
    if "train" not in splits:
        raise ConfigError(
            f"source: all {len(items)} pictures are of {' and '.join(sorted(splits))}; add some to "
            "train on, or give the folder of that name itself as source="
        )
    if "validation" not in splits and validation:
        splits["train"], splits["validation"] = _held_out(splits["train"], validation, seed)
    shards: list[PlannedShard] = []
    for split in SPLIT_ORDER:
        members = splits.get(split, [])
        if shuffle:
            order = numpy_generator(seed, "pack", SPLIT_ORDER.index(split)).permutation(
                len(members)
            )
            members = [members[i] for i in order.tolist()]
        shards += _cut(split, members, shard_bytes, bytes_factor)
    return Plan(digest.hexdigest(), shards)


def _held_out(items: list[Item], validation: float, seed: int) -> tuple[list[Item], list[Item]]:
    count = round(validation * len(items)) if validation < 1 else int(validation)
    if not 0 < count < len(items):
        raise ConfigError(
            f"validation={validation:g} sets {count} of {len(items)} pictures aside; give a part "
            "below 1 or a smaller number, or validation=0"
        )
    chosen = numpy_generator(seed, "pack-validation").choice(len(items), count, replace=False)
    mask = np.zeros(len(items), bool)
    mask[chosen] = True
    train = [item for item, aside in zip(items, mask.tolist(), strict=True) if not aside]
    return train, [item for item, aside in zip(items, mask.tolist(), strict=True) if aside]


def _cut(
    split: str, items: list[Item], shard_bytes: float, bytes_factor: float
) -> list[PlannedShard]:
    """Shards of equal numbers of pictures, give or take one."""
    if not items:
        return []
    total = sum(item.num_bytes for item in items) * bytes_factor + 2048 * len(items)
    total += sum(file.num_bytes for item in items for _, file in item.companions)
    count = max(-(-int(total) // int(shard_bytes)), min(MIN_SHARDS, len(items) // MIN_PER_SHARD))
    count = min(max(1, count), len(items))
    borders = [len(items) * k // count for k in range(count + 1)]
    return [
        PlannedShard(split, k, low, items[low:high])
        for k, (low, high) in enumerate(pairwise(borders))
    ]
