"""The perceptual term: its gradients, its weight files, and the distance without weights."""

import hashlib

import pytest
import torch
from torch.nn.functional import interpolate
from torchmetrics.functional.image import structural_similarity_index_measure

from vae_dist.config.schema import PerceptualConfig
from vae_dist.models import networks
from vae_dist.models.networks import ALEXNET, Lpips, lpips_available
from vae_dist.objectives.perceptual import (
    StructureDistance,
    build_perceptual,
    gradient_error,
    num_scales,
    smallest_side,
)


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_gives_gradients_to_reconstructions_and_to_nothing_else(
    tmp_path, monkeypatch, channels
):
    """With AlexNet's file, of random weights."""
    folder = str(tmp_path)
    assert not lpips_available("lpips_alex", folder)
    torch.manual_seed(0)
    state = Lpips("lpips_alex").state_dict()
    features = {k: v for k, v in state.items() if k.startswith("features")}
    torch.save(features, tmp_path / ALEXNET.name)
    digest = hashlib.sha256((tmp_path / ALEXNET.name).read_bytes()).hexdigest()
    trunk = networks.TRUNKS["lpips_alex"]
    file = trunk.file._replace(sha256=digest)
    monkeypatch.setitem(networks.TRUNKS, "lpips_alex", trunk._replace(file=file))
    assert lpips_available("lpips_alex", folder) and not lpips_available("lpips", folder)
    config = PerceptualConfig(kind="lpips_alex", weights=folder)
    term = build_perceptual(config, torch.device("cpu"))
    images = torch.rand(2, channels, 40, 40) * 2 - 1
    pictures = (images + 0.1 * torch.randn_like(images)).requires_grad_()
    distances = term(pictures, images)
    assert distances.shape == (2,) and distances.dtype == torch.float32 and (distances > 0).all()
    distances.sum().backward()
    assert pictures.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in term.distance.parameters())


def pair(channels=3, height=40, width=56):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(2, channels, height // 8, width // 8, generator=generator)
    first = interpolate(smooth, size=(height, width), mode="bilinear").tanh()
    second = first + 0.2 * torch.randn(first.shape, generator=generator)
    return first, second.clamp(-1, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_that_of_torchmetrics(channels):
    first, second = pair(channels)
    _, everywhere = structural_similarity_index_measure(
        first.double(), second.double(), data_range=2.0, reduction="none", return_full_image=True
    )
    expected = everywhere[..., 5:-5, 5:-5].mean((1, 2, 3))  # where the window is inside
    found = StructureDistance().ssim(first, second)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert (found < 0.9).all()


def test_a_distance_is_zero_for_equal_images_and_grows_with_the_error():
    (first, second), distance = pair(), StructureDistance()
    assert distance(first, first).abs().max() < 1e-6
    near, far = distance(first, first + 0.1 * (second - first)), distance(first, second)
    assert (far > near).all() and (near > 0).all()
    torch.testing.assert_close(distance(second, first), far)
    error = torch.zeros(1, 1, 3, 4)
    error[0, 0, 1, 2] = 0.6  # two of nine differences across, two of eight down
    torch.testing.assert_close(gradient_error(error), torch.tensor([0.6 * (2 / 9 + 2 / 8)]))
    small, other = (x[:1, :1, :12, :13].double() for x in (first, second))
    exact = distance.double()
    inputs = (small.requires_grad_(),)
    assert torch.autograd.gradcheck(lambda x: exact(x, other), inputs, fast_mode=True)


def test_scales_are_used_as_long_as_the_window_fits():
    sizes = ((10, 64), (11, 64), (22, 22), (44, 50), (512, 512))
    assert [num_scales(*size) for size in sizes] == [0, 1, 2, 3, 3]
    kinds = ("structure", "lpips", "lpips_alex")
    assert [smallest_side(PerceptualConfig(kind=kind)) for kind in kinds] == [11, 16, 31]
