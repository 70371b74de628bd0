"""The whole model: shapes, sizes, precision, gradients, and the layout that exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vae_dist.config.load import load_train_config
from vae_dist.config.schema import DataConfig, LikelihoodConfig, ModelConfig, TrainConfig
from vae_dist.models import VAE, build_vae
from vae_dist.models.blocks import AttentionBlock, ResidualBlock
from vae_dist.objectives.elbo import noise_shape
from vae_dist.randomness import torch_generator

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
LAYOUT = Path(__file__).parent / "autoencoder_kl.txt"  # one line a parameter: name, shape

SMALL: dict[str, Any] = {"channels": [8, 8, 16], "blocks": 1, "norm_groups": 4}
KINDS = {
    "bernoulli": LikelihoodConfig(kind="bernoulli"),
    "shared": LikelihoodConfig(variance="shared"),
    "per_pixel": LikelihoodConfig(variance="per_pixel"),
    "per_channel": LikelihoodConfig(variance="per_channel"),
    "discretized": LikelihoodConfig(kind="discretized_gaussian", variance="per_pixel"),
    "mixture": LikelihoodConfig(kind="discretized_logistic_mixture", mixtures=2),
}


def small(latent: str, kind: str = "shared", *, seed: int = 0, **model: Any) -> TrainConfig:
    channels = 1 if kind == "bernoulli" else 3
    return TrainConfig(
        config="test",
        seed=seed,
        data=DataConfig(channels=channels),
        model=ModelConfig(latent=latent, **{**SMALL, **model}),
        likelihood=KINDS[kind],
    )


def away_from_zero(model: nn.Module) -> None:
    """Noise on the layers that start at zero, as training would leave them."""
    generator = torch_generator(0, "test")
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def inputs(model: VAE, batch: int, channels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch_generator(0, "test")
    levels = torch.randint(0, 256, (batch, channels, *size), dtype=torch.uint8, generator=generator)
    uniform = torch.rand(levels.shape, generator=generator)
    noise = torch.randn(batch, *model.latent_shape(*size), generator=generator)
    return model.likelihood.prepare(levels, uniform), noise


def test_the_spatial_default_has_the_layout_of_autoencoder_kl() -> None:
    with torch.device("meta"):
        model = build_vae(TrainConfig(config="test"), (64, 64))
    ours = {
        name: "x".join(map(str, tensor.shape))
        for name, tensor in model.state_dict().items()
        if not name.startswith("likelihood.")
    }
    assert ours == dict(line.split() for line in LAYOUT.read_text().splitlines())


@pytest.mark.parametrize("latent", ["spatial", "vector"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("patch", [1, 2])
def test_shapes_and_types(latent: str, kind: str, patch: int) -> None:
    config, size = small(latent, kind, patch=patch), (18, 21)
    channels = config.data.channels
    model = build_vae(config, size)
    images, noise = inputs(model, 2, channels, size)
    output = model(images, noise)
    stride = 4 * patch
    latent_shape = (4,) if latent == "vector" else (4, -(-18 // stride), -(-21 // stride))
    assert model.latent_shape(*size) == latent_shape
    assert output.log_likelihood.shape == (2,) and output.kl.shape == (2, 4)
    assert output.mean.shape == output.log_variance.shape == (2, *latent_shape)
    assert output.params.shape == (2, model.likelihood.num_params(channels), *size)
    assert output.z.shape == noise.shape
    assert all(tensor.dtype == torch.float32 for tensor in output)


@pytest.mark.parametrize("latent", ["spatial", "vector"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_reach_every_parameter(latent: str, kind: str) -> None:
    config = small(latent, kind)
    model = build_vae(config, (8, 12))
    away_from_zero(model)
    output = model(*inputs(model, 3, config.data.channels, (8, 12)))
    (output.kl.sum() - output.log_likelihood.sum()).backward()
    # Softmax does not see a shift of all keys, so the bias of to_k has no gradient.
    silent = [
        name
        for name, parameter in model.named_parameters()
        if (parameter.grad is None or not parameter.grad.abs().sum() > 1e-6)
        and not name.endswith("to_k.bias")
    ]
    assert silent == []


@pytest.mark.parametrize("latent", ["spatial", "vector"])
def test_padding_has_no_part_in_the_likelihood(latent: str) -> None:
    size = (37, 53)
    model = build_vae(small(latent), size)
    away_from_zero(model)
    images, noise = inputs(model, 2, 3, size)
    output = model(images, noise)
    expected = model.likelihood.log_prob(output.params, images)
    assert output.params.shape[-2:] == size
    assert torch.equal(output.log_likelihood, expected)
    # Replicated by hand to the stride's multiple, then cropped: the same posterior and parameters.
    rows = torch.arange(40).clamp(max=36)
    columns = torch.arange(56).clamp(max=52)
    padded = images[:, :, rows][:, :, :, columns]
    by_hand = build_vae(small(latent), (40, 56))
    by_hand.load_state_dict(model.state_dict())
    mean, _ = by_hand.encode(padded)
    torch.testing.assert_close(mean, output.mean)
    params = by_hand.decode(output.mean, (40, 56))[:, :, :37, :53]
    torch.testing.assert_close(params, model.decode(output.mean, size))


def test_a_spatial_model_takes_other_sizes_and_a_vector_one_refuses_them() -> None:
    spatial, vector = (build_vae(small(latent), (16, 16)) for latent in ("spatial", "vector"))
    images, noise = inputs(spatial, 1, 3, (20, 28))
    assert spatial(images, noise).params.shape == (1, 3, 20, 28)
    with pytest.raises(ValueError, match=r"20x28.*model\.latent=vector.*16x16"):
        vector.encode(images)


def test_each_image_is_on_its_own() -> None:
    """No layer mixes images, so microbatches add up to the batch."""
    model = build_vae(small("spatial"), (8, 8))
    away_from_zero(model)
    images, noise = inputs(model, 4, 3, (8, 8))
    whole = model(images, noise)
    parts = [model(images[i : i + 1], noise[i : i + 1]) for i in range(4)]
    for field in ("log_likelihood", "kl", "params"):
        joined = torch.cat([getattr(part, field) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, field), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("latent", ["spatial", "vector"])
def test_several_draws_of_an_image_are_those_of_several_forwards(latent: str) -> None:
    model = build_vae(small(latent, num_classes=3), (9, 8))
    away_from_zero(model)
    images, _ = inputs(model, 2, 3, (9, 8))
    labels = torch.tensor([2, -1])
    mask = (torch.arange(2 * 72).view(2, 1, 9, 8) % 5 > 0).to(torch.uint8)
    shape = (2, 3, *model.latent_shape(9, 8))
    noise = torch.randn(shape, generator=torch_generator(0, "draws"))
    encodings: list[int] = []
    model.encoder.register_forward_hook(lambda _, args, __: encodings.append(len(args[0])))
    several = model(images, noise, labels, mask)
    assert encodings == [2]  # once for each image
    assert several.log_likelihood.shape == (2, 3) and several.z.shape == shape
    assert several.params.shape == (2, 3, 3, 9, 8)
    for k in range(3):
        one = model(images, noise[:, k], labels, mask)
        torch.testing.assert_close(several.kl, one.kl)
        for field in ("log_likelihood", "z", "params"):
            found, expected = getattr(several, field)[:, k], getattr(one, field)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_vae(small("spatial"), (8, 8)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = build_vae(small("spatial"), (8, 8)).state_dict()
    other = build_vae(small("spatial", seed=1), (8, 8)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


@pytest.mark.parametrize("latent", ["spatial", "vector"])
def test_last_layers_are_float32_under_autocast(latent: str) -> None:
    model = build_vae(small(latent), (8, 8))
    seen: dict[str, torch.dtype] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output.dtype

        return hook

    last = {"conv_in": model.encoder.conv_in, "decoder.conv_out": model.decoder.conv_out}
    if latent == "spatial":
        last |= {"encoder.conv_out": model.encoder.conv_out, "quant_conv": model.quant_conv}
    else:
        last |= {"encoder.linear_out": model.encoder.linear_out}
    for name, layer in last.items():
        layer.register_forward_hook(record(name))
    images, noise = inputs(model, 2, 3, (8, 8))
    exact = model(images, noise)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, noise)
    assert seen.pop("conv_in") == torch.bfloat16
    assert set(seen.values()) == {torch.float32}
    assert all(tensor.dtype == torch.float32 for tensor in output)
    torch.testing.assert_close(output.log_likelihood, exact.log_likelihood, rtol=0.05, atol=0)


def test_blocks_start_as_the_identity() -> None:
    x = torch.randn(2, 8, 3, 5, generator=torch_generator(0, "test"))
    assert torch.equal(AttentionBlock(8, norm_groups=4)(x), x)
    assert torch.equal(ResidualBlock(8, 8, norm_groups=4)(x), x)
    wider = ResidualBlock(8, 12, norm_groups=4)
    assert torch.equal(wider(x), wider.conv_shortcut(x))


def test_attention_is_softmax_attention() -> None:
    block = AttentionBlock(8, norm_groups=4)
    away_from_zero(block)
    x = torch.randn(2, 8, 3, 5, generator=torch_generator(0, "test"))
    normed = nn.functional.group_norm(
        x, 4, block.group_norm.weight, block.group_norm.bias, eps=1e-6
    )
    tokens = normed.flatten(2).transpose(1, 2)
    q, k, v = block.to_q(tokens), block.to_k(tokens), block.to_v(tokens)
    weights = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1)
    expected = x + block.to_out[0](weights @ v).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_shipped_config_builds_on_the_meta_device(path: Path) -> None:
    config = load_train_config([f"config={path}"])
    resolution = config.data.resolution
    size = (resolution, resolution) if isinstance(resolution, int) else (28, 36)
    with torch.device("meta"):
        model = build_vae(config, size)
        noise = torch.empty(noise_shape(config.objective, 2, model.latent_shape(*size)))
        output = model(torch.empty(2, config.data.channels, *size), noise)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert output.params.shape[-2:] == size


def test_dense_towers_have_the_textbook_shapes() -> None:
    config = small("vector", "per_pixel", arch="dense", channels=[32, 16])
    model = build_vae(config, (6, 5))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 2}
    assert shapes == {
        "encoder.hidden.layers.0.weight": (32, 90),
        "encoder.hidden.layers.1.weight": (16, 32),
        "encoder.linear_out.weight": (8, 16),
        "decoder.hidden.layers.0.weight": (16, 4),
        "decoder.hidden.layers.1.weight": (32, 16),
        "decoder.linear_out.weight": (180, 32),
    }
    images, noise = inputs(model, 2, 3, (6, 5))
    output = model(images, noise)
    assert output.params.shape == (2, 6, 6, 5) and output.mean.shape == (2, 4)
    (output.kl.sum() - output.log_likelihood.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_dense_towers_are_told_the_label() -> None:
    config = small("vector", "bernoulli", arch="dense", channels=[16], num_classes=3)
    model = build_vae(config, (6, 5))
    away_from_zero(model)
    images, noise = inputs(model, 2, 1, (6, 5))
    one, other = (model(images, noise, torch.tensor([k, k])) for k in (0, 1))
    assert not torch.equal(one.mean, other.mean)

    assert not torch.equal(*(model.decode(noise, (6, 5), torch.tensor([k, k])) for k in (0, 1)))
