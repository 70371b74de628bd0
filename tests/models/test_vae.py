"""The whole model: shapes, sizes, precision, gradients, labels, masks, draws."""

import math
from pathlib import Path

import pytest
import torch

from vae_dist.config.load import load_train_config
from vae_dist.config.schema import DataConfig, LikelihoodConfig, ModelConfig, TrainConfig
from vae_dist.models.build import build_vae, stride_of
from vae_dist.objectives.elbo import noise_shape

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SIZE = (9, 10)
SMALL = {"channels": [8, 8, 16], "blocks": 1, "norm_groups": 4}
# three groups on two levels, of stride 2 and 4
LADDER = {"arch": "ladder", "channels": [8, 12], "groups": [2, 1], "factors": 2, "patch": 2}
KINDS = {
    "bernoulli": LikelihoodConfig(kind="bernoulli"),
    "shared": LikelihoodConfig(variance="shared"),
    "per_pixel": LikelihoodConfig(variance="per_pixel"),
    "per_channel": LikelihoodConfig(variance="per_channel"),
    "mixture": LikelihoodConfig(kind="discretized_logistic_mixture", mixtures=2),
}
BOTH = pytest.mark.parametrize("latent", ["spatial", "vector"])
EACH = pytest.mark.parametrize("latent", ["spatial", "vector", "ladder"])


def small(latent, kind="shared", *, seed=0, mask="none", **model):
    form = LADDER if latent == "ladder" else {"latent": latent}
    return TrainConfig(
        config="test",
        seed=seed,
        data=DataConfig(channels=1 if kind == "bernoulli" else 3, mask=mask),
        model=ModelConfig(**{**SMALL, **form, **model}),
        likelihood=KINDS[kind],
    )


def away_from_zero(model):
    """Noise on the layers that start at zero, as training would leave them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape))


def trained(config, size=SIZE):
    model = build_vae(config, size)
    away_from_zero(model)
    return model


def inputs(model, batch, channels, size):
    levels = torch.randint(256, (batch, channels, *size), dtype=torch.uint8)
    images = model.likelihood.prepare(levels, torch.rand(levels.shape))
    return images, torch.randn(batch, *model.latent_shape(*size))


MODELS = [
    *(("spatial", kind, {}) for kind in KINDS),
    *(("vector", kind, {"patch": 2}) for kind in KINDS),
    ("spatial", "shared", {"dc_shortcuts": True, "channels": [8, 16, 32], "blocks": [1, 2, 3]}),
    ("vector", "per_pixel", {"dc_shortcuts": True, "patch": 2, "num_classes": 3}),
    ("vector", "per_pixel", {"arch": "dense", "channels": [32, 16], "num_classes": 3}),
    ("spatial", "bernoulli", {"num_classes": 3}),
    ("ladder", "shared", {"num_classes": 3}),
    ("ladder", "per_pixel", {"aggregate": True}),
]


@pytest.mark.parametrize(("latent", "kind", "options"), MODELS)
def test_shapes_types_and_gradients_of_every_parameter(latent, kind, options):
    config, size = small(latent, kind, **options), (18, 21)
    channels, classes = config.data.channels, config.model.num_classes
    model = trained(config, size)
    images, noise = inputs(model, 3, channels, size)
    output = model(images, noise, torch.tensor([0, 2, -1]) if classes else None)
    # a ladder's: 4 channels of one group of 5x6 positions, and of two of 10x12
    rows, columns = (-(-side // stride_of(config.model)) for side in size)
    shapes = {"vector": (4,), "spatial": (4, rows, columns), "ladder": (1, 4 * (30 + 2 * 120))}
    assert model.latent_shape(*size) == shapes[latent]
    assert output.log_likelihood.shape == (3,)
    assert output.kl.shape == (3, 3 if latent == "ladder" else 4)
    assert output.mean.shape == output.log_variance.shape == output.z.shape == noise.shape
    assert output.params.shape == (3, model.likelihood.num_params, *size)
    assert all(tensor.dtype == torch.float32 for tensor in output[:6])
    (output.kl.sum() - output.log_likelihood.sum()).backward()
    # softmax does not see a shift of all keys, so the bias of to_k has no gradient
    grads = {k: p.grad for k, p in model.named_parameters() if not k.endswith("to_k.bias")}
    assert not [k for k, grad in grads.items() if grad is None or not grad.abs().sum() > 1e-6]


@BOTH
def test_padding_has_no_part_in_the_likelihood(latent):
    """Replicated by hand to the stride's multiple, then cropped, images have the same posterior and
    parameters."""
    model = by_hand = trained(small(latent), (37, 53))
    images, noise = inputs(model, 2, 3, (37, 53))
    output = model(images, noise)
    assert torch.equal(output.log_likelihood, model.likelihood.log_prob(output.params, images))
    if latent == "vector":  # bound to one size
        with pytest.raises(ValueError, match=r"40x56.*model\.latent=vector.*37x53"):
            model.latent_shape(40, 56)
        by_hand = build_vae(small(latent), (40, 56))
        by_hand.load_state_dict(model.state_dict())
    padded = images[:, :, torch.arange(40).clamp(max=36)][..., torch.arange(56).clamp(max=52)]
    torch.testing.assert_close(by_hand.encode(padded)[0], output.mean)
    params = by_hand.decode(output.z, (40, 56))[:, :, :37, :53]
    torch.testing.assert_close(params, output.params)


@EACH
def test_several_draws_of_an_image_are_those_of_several_forwards(latent):
    model = trained(small(latent, num_classes=3))
    (images, _), labels = inputs(model, 2, 3, SIZE), torch.tensor([2, -1])
    mask = (torch.arange(2 * 90).view(2, 1, *SIZE) % 5 > 0).to(torch.uint8)
    noise = torch.randn(2, 3, *model.latent_shape(*SIZE))
    encodings = []
    model.encoder.register_forward_hook(lambda _, args, __: encodings.append(len(args[0])))
    several = model(images, noise, labels, mask)
    assert encodings == [2]  # once for each image
    each = [model(images, noise[:, k], labels, mask) for k in range(3)]
    torch.testing.assert_close(several.kl, torch.stack([one.kl for one in each]).mean(0))
    for field in ("log_likelihood", "z", "params", *["log_ratio"] * (latent == "ladder")):
        expected = torch.stack([getattr(one, field) for one in each], 1)
        torch.testing.assert_close(getattr(several, field), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"dc_shortcuts": True}, {"arch": "dense"}])
def test_the_posterior_begins_as_wide_as_it_is_told(options):
    images = torch.randn(2, 3, 16, 16)
    latent = "vector" if "arch" in options else "spatial"
    (mean, usual), (same, narrow) = (
        build_vae(small(latent, initial_sigma=sigma, **options), (16, 16)).encode(images)
        for sigma in (1.0, 0.05)
    )
    assert torch.equal(same, mean)
    expected = torch.full_like(usual, 2 * math.log(0.05))
    torch.testing.assert_close(narrow - usual, expected, rtol=0, atol=1e-4)


@BOTH
def test_last_layers_are_float32_under_autocast(latent):
    model, seen = trained(small(latent), (8, 8)), {}
    last = ["encoder.linear_out"] if latent == "vector" else ["encoder.conv_out", "quant_conv"]
    expected = dict.fromkeys(["decoder.conv_out", *last], torch.float32)
    expected["encoder.conv_in"] = torch.bfloat16
    for name in expected:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: seen.update({name: output.dtype})
        )
    images, noise = inputs(model, 2, 3, (8, 8))
    exact = model(images, noise)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, noise)
    assert seen == expected
    assert all(tensor.dtype == torch.float32 for tensor in output[:6])
    torch.testing.assert_close(output.log_likelihood, exact.log_likelihood, rtol=0.05, atol=0)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_shipped_config_is_short_and_builds_on_the_meta_device(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    config = load_train_config([f"config={path}"])
    assert config.run == f"runs/{path.stem}"
    resolution = config.data.resolution
    size = (resolution, resolution) if isinstance(resolution, int) else (28, 36)
    with torch.device("meta"):
        model = build_vae(config, size)
        noise = torch.empty(noise_shape(config.objective, 2, model.latent_shape(*size)))
        output = model(torch.empty(2, config.data.channels, *size), noise)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert output.params.shape[-2:] == size


@BOTH
def test_weights_are_a_function_of_the_seed_and_labels_begin_without_effect(latent):
    plain, conditional, other = (
        build_vae(small(latent, num_classes=n, seed=seed), SIZE)
        for n, seed in ((0, 1), (3, 1), (0, 2))
    )
    ours, theirs = conditional.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(plain.encoder.conv_in.weight, other.encoder.conv_in.weight)
    added = ours.keys() - theirs.keys()
    assert added and all("film" in name or name == "label_embedding.weight" for name in added)
    images, noise = inputs(plain, 3, 3, SIZE)
    outputs = plain(images, noise)[:6], conditional(images, noise, torch.tensor([0, 2, -1]))[:6]
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


@pytest.mark.parametrize(
    ("latent", "arch"), [("spatial", "conv"), ("vector", "dense"), ("ladder", "ladder")]
)
def test_both_towers_see_the_label_of_each_image(latent, arch):
    vae = trained(small(latent, arch=arch, num_classes=3))
    images, noise = inputs(vae, 3, 3, SIZE)
    output, other = (vae(images, noise, torch.tensor([y, 2, -1])) for y in (0, 1))
    assert not torch.allclose(output.mean[0], other.mean[0])
    torch.testing.assert_close(output.params[1:], other.params[1:])
    z = output.mean[:1]
    by_label = [vae.decode(z, SIZE, torch.tensor([y])) for y in (-1, 0, 1, 2)]
    assert all(not torch.allclose(by_label[0], params) for params in by_label[1:])
    torch.testing.assert_close(by_label[0], vae.decode(z, SIZE))  # none is -1


@pytest.mark.parametrize(
    ("latent", "mask"), [("spatial", "none"), ("spatial", "half"), ("ladder", "half")]
)
def test_missing_pixels_are_not_looked_at_and_observed_ones_count(latent, mask):
    vae = trained(small(latent, mask=mask))
    images, noise = inputs(vae, 2, 3, SIZE)
    observed = torch.zeros(2, 1, *SIZE, dtype=torch.uint8)
    observed[:, :, : SIZE[0] // 2] = 1
    output = vae(images, noise, mask=observed)
    for fill in (0.7, math.nan):
        other = vae(torch.where(observed > 0, images, fill), noise, mask=observed)
        assert all(torch.equal(*pair) for pair in zip(output[:6], other[:6], strict=True))
    # an ordinary model sees mid-grey pixels, one that was built for masks that they are missing
    grey = vae.encode(torch.where(observed > 0, images, 0.0))[0]
    found = vae.encode(images, mask=observed)[0]
    assert torch.allclose(grey, found) == (mask == "none")
    expected = vae.likelihood.log_prob(output.params, images, observed)
    torch.testing.assert_close(output.log_likelihood, expected)
    everything = torch.ones_like(observed)
    torch.testing.assert_close(vae(images, noise).mean, vae(images, noise, mask=everything).mean)
