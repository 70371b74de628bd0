"""The perceptual term: LPIPS has gradients, weight files are found where they are published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import PerceptualConfig
from vae_dist.models import networks
from vae_dist.models.networks import Lpips, lpips_available
from vae_dist.objectives.perceptual import (
    PerceptualTerm,
    build_perceptual,
    fetch_weights,
    smallest_side,
)

CPU = torch.device("cpu")


def random_lpips() -> Lpips:
    torch.manual_seed(0)
    network = Lpips("alex")
    for name, parameter in network.named_parameters():
        if name.startswith("lin"):
            parameter.data.abs_()
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet's file and its heads, of random weights, under the names of their authors."""
    folder = tmp_path_factory.mktemp("weights")
    state = random_lpips().state_dict()
    features = {k: v for k, v in state.items() if k.startswith("features")}
    name = f"{Path(networks.ALEXNET.name).stem}.safetensors"
    networks.safetensors.torch.save_file(features, folder / name)
    torch.save({k: v for k, v in state.items() if k.startswith("lin")}, folder / "alex.pth")
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_gives_gradients_to_reconstructions_and_to_nothing_else(folder, channels) -> None:
    term = build_perceptual(PerceptualConfig(kind="lpips_alex", weights=str(folder)), CPU)
    assert term is not None
    images = torch.rand(2, channels, 40, 40) * 2 - 1
    pictures = (images + 0.1 * torch.randn_like(images)).requires_grad_()
    distances = term(pictures, images)
    assert distances.shape == (2,) and distances.dtype == torch.float32 and (distances > 0).all()
    distances.sum().backward()
    assert pictures.grad is not None and pictures.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in term._distance.parameters())


def test_a_step_against_the_gradient_lowers_the_distance() -> None:
    images = torch.rand(1, 3, 48, 48) * 2 - 1
    for term in (
        PerceptualTerm(PerceptualConfig(), random_lpips()),
        build_perceptual(PerceptualConfig(kind="structure"), CPU),
    ):
        assert term is not None
        pictures = (images * 0.7).requires_grad_()
        before = term(pictures, images)
        (gradient,) = torch.autograd.grad(before.sum(), pictures)
        after = term(pictures - 0.01 * gradient / gradient.abs().max(), images)
        assert float(after.detach()) < float(before.detach())


def test_weights_are_at_hand_where_both_files_are(folder, tmp_path) -> None:
    assert lpips_available("alex", folder)
    assert not lpips_available("vgg", folder)
    assert not lpips_available("alex", tmp_path)


def test_missing_weights_are_said_with_the_file_and_the_folder(tmp_path, monkeypatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ConfigError, match=r"VGG16 are not in .*fetch https"):
        fetch_weights(PerceptualConfig(kind="lpips", weights=str(tmp_path)))
    fetch_weights(PerceptualConfig(kind="structure"))


def test_the_smallest_image_of_each_kind() -> None:
    kinds = ("none", "structure", "lpips", "lpips_alex")
    assert [smallest_side(PerceptualConfig(kind=kind)) for kind in kinds] == [1, 11, 16, 31]
