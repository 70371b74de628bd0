"""Ranks that drift apart are found and named."""

import pytest
import torch

from tests.support.distributed import run_ranks
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime
from vae_dist.training.divergence import check_equal_over_ranks, checksums
from vae_dist.training.guard import TrainingFailed


def compare(bad_rank: int) -> str:
    """One bit of one weight of a rank is turned over."""
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    weights = {"a": torch.arange(5.0), "b": torch.ones(3, 2)}
    if runtime.rank == bad_rank:
        weights["b"].view(torch.int32)[1, 1] ^= 1
    try:
        check_equal_over_ranks(runtime, weights, step=7)
    except TrainingFailed as failure:
        return str(failure)
    return ""


def test_one_bit_of_one_rank_is_found_and_every_rank_says_who():
    assert run_ranks(2, compare, -1) == ["", ""]
    messages = run_ranks(3, compare, 1)
    assert len(set(messages)) == 1
    assert "after step 7 rank 1 of 3 holds other weights than the rest" in messages[0]
    assert "1 of 2 tensors, b first" in messages[0]
    assert "ranks 0, 1 hold weights that differ" in run_ranks(2, compare, 0)[0]


@pytest.mark.parametrize("value", [0.0, float("nan"), 1e-42])
def test_a_checksum_sees_every_bit(value):
    one = {"w": torch.full((4,), value)}
    other = {"w": one["w"].clone()}
    assert torch.equal(checksums(one), checksums(other))
    other["w"].view(torch.int32)[3] ^= 1
    assert not torch.equal(checksums(one), checksums(other))
