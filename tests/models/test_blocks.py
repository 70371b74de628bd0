"""Blocks of the towers: attention, FiLM, changes of resolution, gradient checkpointing."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.test_vae import away_from_zero, inputs, small, trained
from vae_dist.models import blocks
from vae_dist.models.build import build_vae


def test_blocks_start_as_the_identity_and_attention_is_softmax_attention():
    x, block = torch.randn(2, 8, 3, 5), blocks.AttentionBlock(8, norm_groups=4)
    same, wide = (blocks.ResidualBlock(8, channels, norm_groups=4) for channels in (8, 12))
    assert torch.equal(block(x), x) and torch.equal(same(x), x)
    assert torch.equal(wide(x), wide.conv_shortcut(x))
    away_from_zero(block)
    normed = F.group_norm(x, 4, block.group_norm.weight, block.group_norm.bias, eps=1e-6)
    tokens = normed.flatten(2).transpose(1, 2)
    q, k, v = block.to_q(tokens), block.to_k(tokens), block.to_v(tokens)
    weights = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1)
    expected = x + block.to_out[0](weights @ v).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_convolution_of_doubled_is_that_of_the_enlarged_map(size):
    shapes = (2, 3, *size), (4, 3, 3, 3), (4,)
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    found, (x, *layer) = blocks.convolution_of_doubled(*tensors), tensors
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), *layer, padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    gradients = (torch.autograd.grad(output, tensors, upstream) for output in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_shortcuts_are_means_of_four_positions_down_and_copies_up():
    x, down = torch.randn(1, 2, 4, 6), blocks.Downsample(2, 4, shortcut=True)
    h = down(x)
    for channel in range(4):  # of 8 = 2 channels x 4 positions, two by two: one row of a square
        rows = x[:, channel // 2, channel % 2 :: 2]
        torch.testing.assert_close(h[:, channel], (rows[..., 0::2] + rows[..., 1::2]) / 2)
    away_from_zero(down)
    beside = F.conv2d(F.pad(x, (0, 1, 0, 1)), down.conv.weight, down.conv.bias, stride=2)
    torch.testing.assert_close(down(x), h + beside)
    there, back = blocks.Downsample(2, 8, shortcut=True), blocks.Upsample(8, 2, shortcut=True)
    assert torch.equal(back(there(x)), x)  # before training, where convolutions are zero
    h = torch.randn(1, 8, 1, 1)
    wide = blocks.Upsample(8, 4, shortcut=True)
    assert torch.equal(wide(h)[0, 1].flatten(), h[0, [2, 2, 3, 3], 0, 0])  # two copies of each


def test_the_means_of_z_have_a_shortcut_and_the_log_variances_none():
    model, seen = build_vae(small("spatial", dc_shortcuts=True), (16, 16)), []
    assert model.quant_conv is None and model.post_quant_conv is None
    model.encoder.mid_block.register_forward_hook(lambda *args: seen.append(args[2]))
    model.decoder.mid_block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    blocks.zeroed(model.encoder.conv_out)
    blocks.zeroed(model.decoder.conv_in)
    mean, log_variance = model.encode(torch.randn(2, 3, 16, 16))
    model.decode(mean, (16, 16))
    torch.testing.assert_close(mean, seen[0].unflatten(1, (4, 4)).mean(2))
    torch.testing.assert_close(log_variance, torch.zeros_like(mean), rtol=0, atol=1e-4)
    assert torch.equal(seen[1], mean.repeat_interleave(4, dim=1))


@pytest.mark.parametrize("shortcuts", [False, True])
def test_checkpointing_gives_the_same_gradients_in_less_memory(shortcuts):
    gradients, num_bytes = [], []
    for on in (False, True):
        torch.manual_seed(0)
        options = {"dc_shortcuts": shortcuts, "gradient_checkpointing": on}
        model, kept = trained(small("spatial", "per_pixel", **options), (32, 32)), {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(*inputs(model, 2, 3, (32, 32)))
            loss = output.kl.sum() - output.log_likelihood.sum()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        num_bytes.append(sum(kept.values()))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert num_bytes[1] < 0.5 * num_bytes[0]
