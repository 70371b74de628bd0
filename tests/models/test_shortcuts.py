"""Space-to-channel shortcuts, blocks of each level, and gradient checkpointing."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.test_vae import away_from_zero, inputs, small
from tests.support.distributed import run_ranks
from vae_dist.config.checks import problems
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime, full_value
from vae_dist.models import VAE, build_vae
from vae_dist.models.blocks import Downsample, Upsample, averaged, repeated
from vae_dist.randomness import torch_generator
from vae_dist.training.memory import step_cost


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(0, "test"))


def test_a_shortcut_down_is_means_of_the_four_positions_side_by_side() -> None:
    x = image(1, 2, 4, 6)
    down = Downsample(2, 4, shortcut=True)
    h = down(x)
    assert h.shape == (1, 4, 2, 3)
    for channel in range(4):  # of 8 = 2 channels x 4 positions, two by two: one row of a square
        source, row = channel // 2, channel % 2
        rows = x[:, source, row::2]
        torch.testing.assert_close(h[:, channel], (rows[..., 0::2] + rows[..., 1::2]) / 2)
    away_from_zero(down)
    beside = F.conv2d(F.pad(x, (0, 1, 0, 1)), down.conv.weight, down.conv.bias, stride=2)
    torch.testing.assert_close(down(x), h + beside)


def test_a_shortcut_up_undoes_a_shortcut_down_where_nothing_is_averaged() -> None:
    x = image(2, 3, 4, 6)
    down, up = Downsample(3, 12, shortcut=True), Upsample(12, 3, shortcut=True)
    assert torch.equal(up(down(x)), x)  # before training, where convolutions are zero
    wide, narrow = Upsample(8, 4, shortcut=True), Upsample(4, 4, shortcut=True)
    h = image(1, 8, 1, 1)
    assert torch.equal(wide(h)[0, 1].flatten(), h[0, [2, 2, 3, 3], 0, 0])  # two copies of each
    assert torch.equal(narrow(h[:, :4])[0, 1].flatten(), h[0, [1] * 4, 0, 0])
    torch.testing.assert_close(averaged(repeated(h, 24), 8), h)


def test_the_means_of_z_have_a_shortcut_and_the_log_variances_none() -> None:
    model = build_vae(small("spatial", dc_shortcuts=True), (16, 16))
    assert model.quant_conv is None and model.post_quant_conv is None
    last: list[Tensor] = []
    model.encoder.mid_block.register_forward_hook(lambda *args: last.append(args[-1]))
    nn.init.zeros_(model.encoder.conv_out.weight)
    nn.init.zeros_(model.encoder.conv_out.bias)
    mean, log_variance = model.encode(image(2, 3, 16, 16))
    torch.testing.assert_close(mean, last[0].unflatten(1, (4, 4)).mean(2))
    torch.testing.assert_close(log_variance, torch.zeros_like(mean), rtol=0, atol=1e-4)
    first: list[Tensor] = []
    model.decoder.mid_block.register_forward_hook(lambda *args: first.append(args[1][0]))
    nn.init.zeros_(model.decoder.conv_in.weight)
    nn.init.zeros_(model.decoder.conv_in.bias)
    model.decode(mean, (16, 16))
    assert torch.equal(first[0], mean.repeat_interleave(4, dim=1))


def test_widths_change_with_the_resolution_and_every_parameter_learns() -> None:
    config = small("spatial", dc_shortcuts=True, channels=[8, 16, 32], blocks=[1, 2, 3])
    model = build_vae(config, (16, 16))
    assert not any("conv_shortcut" in name for name in model.state_dict())
    assert [len(level.resnets) for level in model.encoder.down_blocks] == [1, 2, 3]
    assert [len(level.resnets) for level in model.decoder.up_blocks] == [4, 3, 2]
    away_from_zero(model)
    output = model(*inputs(model, 2, 3, (16, 16)))
    (output.kl.sum() - output.log_likelihood.sum()).backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if (parameter.grad is None or not parameter.grad.abs().sum() > 1e-6)
        and not name.endswith("to_k.bias")
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"channels": [8, 24], "latent_channels": 4}, "no shortcut from 8 to 24 channels"),
        ({"channels": [8, 16], "latent_channels": 3}, "model.latent_channels=3 does not divide"),
        ({"channels": [8, 16], "dc_shortcuts": False, "blocks": [1]}, "each of the 2 levels"),
        ({"channels": [8, 16], "dc_shortcuts": False, "blocks": 0}, "must be a positive count"),
    ],
)
def test_what_does_not_fit_is_said(model: dict[str, Any], words: str) -> None:
    config = small("spatial", **{"dc_shortcuts": True, **model})
    config.data.train = config.data.validation = "shards"
    found = problems(config)
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(
    ("latent", "model"),
    [
        ("spatial", {}),
        ("spatial", {"dc_shortcuts": True}),
        ("vector", {}),
        ("vector", {"arch": "dense"}),
    ],
)
def test_the_posterior_begins_as_wide_as_it_is_told(latent: str, model: dict[str, Any]) -> None:
    images = image(2, 3, 16, 16)
    (mean, usual), (same, narrow) = (
        build_vae(small(latent, initial_sigma=sigma, **model), (16, 16)).encode(images)
        for sigma in (1.0, 0.05)
    )
    assert torch.equal(same, mean)
    expected = torch.full_like(usual, 2 * math.log(0.05))
    torch.testing.assert_close(narrow - usual, expected, rtol=0, atol=1e-4)


# gradient checkpointing


def gradients(model: VAE, size: tuple[int, int]) -> tuple[dict[str, Tensor], int]:
    """Of the negative ELBO, and the bytes that its backward was handed."""
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, noise = inputs(model, 2, 3, size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images, noise)
        loss = output.kl.sum() - output.log_likelihood.sum()
    loss.backward()
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}, sum(
        held.values()
    )


@pytest.mark.parametrize("shortcuts", [False, True])
def test_checkpointing_gives_the_same_gradients_in_less_memory(shortcuts: bool) -> None:
    outcomes = []
    for on in (False, True):
        config = small("spatial", "per_pixel", dc_shortcuts=shortcuts, gradient_checkpointing=on)
        model = build_vae(config, (32, 32))
        away_from_zero(model)
        outcomes.append(gradients(model, (32, 32)))
    (plain, all_bytes), (again, few_bytes) = outcomes
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert few_bytes < 0.5 * all_bytes


def test_the_estimate_of_memory_knows_of_checkpointing() -> None:
    peaks = []
    for on in (False, True):
        config = small("spatial", gradient_checkpointing=on)
        config.training.precision = "no"
        model = build_vae(config, (32, 32))
        away_from_zero(model)
        _, held_bytes = gradients(model, (32, 32))
        estimate = step_cost(config, (32, 32), torch.device("cpu"))
        assert held_bytes < 2 * estimate.image_bytes < 3 * held_bytes, on
        peaks.append(estimate.image_bytes)
    assert peaks[1] < peaks[0]


def step_gradients(parallel: str, checkpointing: bool) -> dict[str, Tensor]:
    """Of two accumulated microbatches."""
    options = RuntimeConfig(threads=1)
    options.parallel = parallel  # type: ignore[assignment]
    runtime = Runtime.start(options, precision="no")
    vae = build_vae(small("spatial", gradient_checkpointing=checkpointing), (8, 8))
    away_from_zero(vae)
    wrapped = runtime.strategy.wrap(vae)
    for number in range(2):
        images, noise = inputs(vae, 2, 3, (8, 8))
        images = images * (1 - 0.3 * number - 0.2 * runtime.rank)
        with runtime.strategy.accumulate(wrapped, is_last=number == 1):
            output = wrapped(images, noise)
            (output.kl.sum() - output.log_likelihood.sum()).backward()
    found = {k: full_value(p.grad).clone() for k, p in vae.named_parameters() if p.grad is not None}
    del wrapped
    return found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_checkpointing_changes_no_gradient_on_two_ranks(parallel: str) -> None:
    plain, again = (
        run_ranks(2, functools.partial(step_gradients, parallel, on)) for on in (False, True)
    )
    for rank in range(2):
        assert plain[rank].keys() == again[rank].keys() and len(plain[rank]) > 40
        assert all(torch.equal(plain[rank][name], again[rank][name]) for name in plain[rank])
