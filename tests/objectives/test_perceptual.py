"""The perceptual term: its gradients, its weight files, and the distance without weights."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate
from torchmetrics.functional.image import structural_similarity_index_measure

from vae_dist.config.schema import PerceptualConfig
from vae_dist.models import networks
from vae_dist.objectives import perceptual


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_gives_gradients_to_reconstructions_and_to_nothing_else(
    tmp_path, monkeypatch, channels
):
    """With AlexNet's file, of random weights."""
    path, folder = tmp_path / networks.ALEXNET.name, str(tmp_path)
    monkeypatch.setattr(perceptual, "fetch", lambda file, folder: Path(folder, file.name))
    assert not networks.lpips_available("lpips_alex", folder)
    torch.manual_seed(0)
    state = networks.alexnet_features().state_dict()
    torch.save({f"features.{name}": tensor for name, tensor in state.items()}, path)
    available = [networks.lpips_available(kind, folder) for kind in ("lpips_alex", "lpips")]
    assert available == [True, False]
    config = PerceptualConfig(kind="lpips_alex", weights=folder)
    term = perceptual.build_perceptual(config, torch.device("cpu"))
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
    found = perceptual.StructureDistance().ssim(first, second)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert (found < 0.9).all()


def test_a_distance_is_zero_for_equal_images_and_grows_with_the_error():
    (first, second), distance = pair(), perceptual.StructureDistance()
    assert distance(first, first).abs().max() < 1e-6
    near, far = distance(first, first + 0.1 * (second - first)), distance(first, second)
    assert (far > near).all() and (near > 0).all()
    torch.testing.assert_close(distance(second, first), far)
    error = torch.zeros(1, 1, 3, 4)
    error[0, 0, 1, 2] = 0.6  # two of nine differences across, two of eight down
    torch.testing.assert_close(
        perceptual.gradient_error(error), torch.tensor([0.6 * (2 / 9 + 2 / 8)])
    )
    small, other = (x[:1, :1, :12, :13].double() for x in (first, second))
    exact = distance.double()
    inputs = (small.requires_grad_(),)
    assert torch.autograd.gradcheck(lambda x: exact(x, other), inputs, fast_mode=True)


def test_scales_are_used_as_long_as_the_window_fits():
    sizes = ((10, 64), (11, 64), (22, 22), (44, 50), (512, 512))
    assert [perceptual.num_scales(*size) for size in sizes] == [0, 1, 2, 3, 3]
    kinds = ("structure", "lpips", "lpips_alex")
    assert [perceptual.smallest_side(PerceptualConfig(kind=kind)) for kind in kinds] == [11, 16, 31]
