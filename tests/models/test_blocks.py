"""A convolution of an enlarged feature map, computed without enlarging it."""

import pytest
import torch
import torch.nn.functional as F

from vae_dist.models.blocks import Upsample, convolution_of_doubled


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_convolution_of_doubled_is_that_of_the_enlarged_map(size, channels_last):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight, bias = torch.randn(4, 3, 3, 3, dtype=x.dtype), torch.randn(4, dtype=x.dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    found = convolution_of_doubled(x, weight, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(
        memory_format=torch.channels_last
        if channels_last and not x.is_contiguous()
        else torch.contiguous_format
    )
    upstream = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(wanted, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_upsample_keeps_its_input_for_the_backward_and_no_enlarged_one():
    block = Upsample(8, 8)
    kept = []
    x = torch.randn(1, 8, 16, 16, requires_grad=True)

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, None)
    assert max(tensor.numel() for tensor in kept) == x.numel()
