"""The perceptual term: its gradients, its weight files, and the distance without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from vae_dist.config.schema import PerceptualConfig
from vae_dist.models import networks
from vae_dist.models.networks import Lpips, lpips_available
from vae_dist.objectives.perceptual import (
    StructureDistance,
    build_perceptual,
    gradient_error,
    num_scales,
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


def test_weights_are_at_hand_where_both_files_are(folder, tmp_path) -> None:
    assert lpips_available("alex", folder)
    assert not lpips_available("vgg", folder)
    assert not lpips_available("alex", tmp_path)


def test_the_smallest_image_of_each_kind() -> None:
    kinds = ("none", "structure", "lpips", "lpips_alex")
    assert [smallest_side(PerceptualConfig(kind=kind)) for kind in kinds] == [1, 11, 16, 31]


# structure


def pair(channels: int = 3, height: int = 40, width: int = 56) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(2, channels, height // 8, width // 8, generator=generator)
    first = torch.nn.functional.interpolate(smooth, size=(height, width), mode="bilinear").tanh()
    second = first + 0.2 * torch.randn(first.shape, generator=generator)
    return first, second.clamp(-1, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_that_of_torchmetrics(channels: int) -> None:
    first, second = pair(channels)
    _, everywhere = structural_similarity_index_measure(
        first.double(), second.double(), data_range=2.0, reduction="none", return_full_image=True
    )
    expected = everywhere[..., 5:-5, 5:-5].mean((1, 2, 3))  # where the window is inside
    found = StructureDistance().ssim(first, second)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert (found < 0.9).all()


def test_a_distance_is_zero_for_equal_images_and_grows_with_the_error() -> None:
    first, second = pair()
    distance = StructureDistance()
    assert distance(first, first).abs().max() < 1e-6
    near, far = distance(first, first + 0.1 * (second - first)), distance(first, second)
    assert (far > near).all() and (near > 0).all()
    torch.testing.assert_close(distance(second, first), far)


def test_gradient_error_is_of_neighbours() -> None:
    error = torch.zeros(1, 1, 3, 4)
    error[0, 0, 1, 2] = 0.6  # two of nine differences across, two of eight down
    torch.testing.assert_close(gradient_error(error), torch.tensor([0.6 * (2 / 9 + 2 / 8)]))


@pytest.mark.parametrize(
    ("size", "scales"),
    [((10, 64), 0), ((11, 64), 1), ((22, 22), 2), ((44, 50), 3), ((512, 512), 3)],
)
def test_scales_are_used_as_long_as_the_window_fits(size: tuple[int, int], scales: int) -> None:
    assert num_scales(*size) == scales
    images = torch.zeros(1, 1, *size)
    if scales:
        assert StructureDistance()(images, images).shape == (1,)
    else:
        with pytest.raises(ValueError, match="10x64"):
            StructureDistance()(images, images)


def test_the_gradient_is_that_of_finite_differences() -> None:
    first, second = (x[:1, :1, :12, :13].double() for x in pair())
    distance = StructureDistance().double()
    assert torch.autograd.gradcheck(
        lambda x: distance(x, second), (first.requires_grad_(),), fast_mode=True
    )
