"""Whether all ranks hold the same weights, bit for bit.

In: named tensors that every rank should hold alike. Out: nothing, or TrainingFailed that names the
ranks and the first tensor. The checksum of a tensor is the sum of its 32-bit patterns: integers, so
that no order of summation changes it, and one message of 8 bytes a tensor compares all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist

from vae_dist.distributed import Runtime, is_sharded
from vae_dist.training.guard import TrainingFailed


def checksums(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """int64 (number of tensors,), on their device. The tensors are float32."""
    return torch.stack(
        [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors.values()]
    )


def check_equal_over_ranks(
    runtime: Runtime, tensors: Mapping[str, torch.Tensor], *, step: int
) -> None:
    """Every rank takes part, and every rank raises TrainingFailed when one of them differs.
    Sharded tensors are left out: no rank holds what another one has."""
    tensors = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
    if runtime.world == 1 or not tensors:
        return
    mine = checksums(tensors)
    everyone = [torch.empty_like(mine) for _ in range(runtime.world)]
    dist.all_gather(everyone, mine)
    by_rank = [tuple(one.tolist()) for one in everyone]
    if len(set(by_rank)) == 1:
        return
    usual, num_usual = Counter(by_rank).most_common(1)[0]
    others = [rank for rank, sums in enumerate(by_rank) if sums != usual]
    where = [i for i, sums in enumerate(zip(*by_rank, strict=True)) if len(set(sums)) > 1]
    first = list(tensors)[where[0]]
    who = f"rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}"
    if num_usual * 2 <= runtime.world:  # nobody can say who is right
        who = f"ranks {', '.join(map(str, range(runtime.world)))}"
        sentence = f"{who} hold weights that differ from each other"
    else:
        sentence = f"{who} of {runtime.world} holds other weights than the rest"
    raise TrainingFailed(
        f"after step {step} {sentence}: {len(where)} of {len(tensors)} tensors, {first} first. "
        "Nothing was saved since; suspect the memory or the device of these ranks. The same "
        "command goes on from the last checkpoint"
    )
