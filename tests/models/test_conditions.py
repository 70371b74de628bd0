"""What a model is told beside the image: its label."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.test_vae import away_from_zero, inputs, small
from vae_dist.models import VAE, build_vae
from vae_dist.models.blocks import Film
from vae_dist.randomness import torch_generator

SIZE = (9, 10)


def model(latent: str = "spatial", **conditions: Any) -> VAE:
    config = small(latent, num_classes=conditions.get("num_classes", 0))
    config.data.mask = conditions.get("mask", "none")
    return build_vae(config, SIZE)


def test_film_is_a_scale_and_a_shift_for_each_channel() -> None:
    film = Film(3, 2)
    x = torch.randn(4, 2, 5, 6, generator=torch_generator(0, "x"))
    condition = torch.randn(4, 3, generator=torch_generator(1, "x"))
    assert torch.equal(film(x, condition), x)  # zeros
    away_from_zero(film)
    moved = condition @ film.weight.T + film.bias
    for image in range(4):
        for channel in range(2):
            expected = (1 + moved[image, channel]) * x[image, channel] + moved[image, 2 + channel]
            torch.testing.assert_close(film(x, condition)[image, channel], expected)


@pytest.mark.parametrize("latent", ["spatial", "vector"])
def test_a_conditional_model_begins_as_the_unconditional_one(latent: str) -> None:
    plain, conditional = model(latent), model(latent, num_classes=3)
    ours, theirs = conditional.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    added = ours.keys() - theirs.keys()
    assert added and all("film" in name or name == "label_embedding.weight" for name in added)
    images, noise = inputs(plain, 3, 3, SIZE)
    labels = torch.tensor([0, 2, -1])
    for one, other in zip(plain(images, noise), conditional(images, noise, labels), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_both_towers_are_told_the_label_of_each_image() -> None:
    vae = model(num_classes=3)
    away_from_zero(vae)
    images, noise = inputs(vae, 3, 3, SIZE)
    labels = torch.tensor([0, 2, -1])
    output = vae(images, noise, labels)
    other = vae(images, noise, torch.tensor([1, 2, -1]))
    assert not torch.allclose(output.mean[0], other.mean[0])
    torch.testing.assert_close(output.params[1:], other.params[1:])
    z = vae.encode(images, labels)[0]
    by_label = [vae.decode(z[:1], SIZE, torch.tensor([y])) for y in (-1, 0, 1, 2)]
    assert all(not torch.allclose(by_label[0], params) for params in by_label[1:])
    torch.testing.assert_close(by_label[0], vae.decode(z[:1], SIZE))  # none is -1
    alone = vae(images[2:], noise[2:])
    torch.testing.assert_close(output.params[2:], alone.params, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_embedding_and_every_scale() -> None:
    vae = model("vector", num_classes=2)
    away_from_zero(vae)
    output = vae(*inputs(vae, 3, 3, SIZE), torch.tensor([0, 1, -1]))
    (output.kl.sum() - output.log_likelihood.sum()).backward()
    assert (vae.label_embedding.weight.grad.abs().sum(1) > 0).all()
    films = [p for name, p in vae.named_parameters() if "film" in name]
    assert films and all((p.grad.abs() > 0).any() for p in films)
