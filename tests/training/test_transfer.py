"""Batches on their way to the device."""

from __future__ import annotations

import pytest
import torch

from vae_dist.data.loader import Batch, Group
from vae_dist.training.step import Transfer


def batch(*, pin: bool) -> Batch:
    groups = []
    for slot, size in enumerate((4, 6)):
        images = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
        images = images.pin_memory() if pin else images
        groups.append(Group((slot,), images.permute(0, 3, 1, 2), torch.tensor([slot, -1])))
    return Batch(3, tuple(groups), (), ())


def test_without_an_accelerator_batches_stay() -> None:
    given = batch(pin=False)
    assert Transfer(torch.device("cpu"))(given) is given


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_cuda_device_gets_the_same_values() -> None:
    transfer = Transfer(torch.device("cuda"))
    for given in (batch(pin=True) for _ in range(20)):
        moved = transfer(given)
        for before, after in zip(given.groups, moved.groups, strict=True):
            assert after.images.is_cuda and torch.equal(after.images.cpu(), before.images)
            assert after.slots == before.slots and torch.equal(after.labels, before.labels)
