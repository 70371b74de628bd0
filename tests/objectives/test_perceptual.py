"""The perceptual term: its gradients, its weight files, and the distance without weights."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate
from torchmetrics.functional.image import lpips as oracle
from torchmetrics.functional.image import structural_similarity_index_measure

from vae_dist.config.schema import PerceptualConfig
from vae_dist.models import networks
from vae_dist.objectives import perceptual
from vae_dist.objectives.perceptual import StructureDistance, gradient_error


@pytest.mark.parametrize(
    ("kind", "net", "channels"), [("lpips", "vgg", 3), ("lpips_alex", "alex", 1)]
)
def test_lpips_is_that_of_torchmetrics_with_gradients_to_images_alone(
    kind, net, channels, tmp_path, monkeypatch
):
    """Of files with random weights."""
    trunk, folder = networks.TRUNKS[kind], str(tmp_path)
    monkeypatch.setattr(perceptual, "fetch", lambda file, folder: Path(folder, file.name))
    assert not networks.lpips_available(kind, folder)
    with torch.device("meta"):
        state = networks.Lpips(kind).state_dict()
    weights = {k: 0.05 * torch.randn(v.shape) for k, v in state.items() if "features" in k}
    torch.save(weights, tmp_path / trunk.file.name)
    assert networks.lpips_available(kind, folder)
    config = PerceptualConfig(kind=kind, weights=folder)
    term = perceptual.build_perceptual(config, torch.device("cpu"))
    monkeypatch.setattr(oracle, "_get_tv_model_features", lambda *_: term.distance.features)
    # torchmetrics reads its heads without map_location
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: load(*a, **{**k, "map_location": "cpu"}))
    theirs = oracle._LPIPS(net=net, pretrained=True, pnet_rand=True)
    one, other = torch.rand(2, 2, channels, 40, 36) * 2 - 1
    found = term(one.requires_grad_(), other)
    expected = theirs(one.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1)).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert (found > 0).all() and term(one, one).tolist() == [0, 0]
    found.sum().backward()
    assert one.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in term.distance.parameters())
    smallest = one[..., : trunk.smallest_side, : trunk.smallest_side]
    assert term(smallest, smallest).shape == (2,)
    with pytest.raises(RuntimeError):
        term(smallest[..., :-1], smallest[..., :-1])


def pair(channels=3):
    smooth = torch.randn(2, channels, 5, 7)
    first = interpolate(smooth, size=(40, 56), mode="bilinear").tanh()
    return first, (first + 0.2 * torch.randn(first.shape)).clamp(-1, 1)


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
    small = [x[:1, :1, :12, :13].double().requires_grad_() for x in (first, second)]
    assert torch.autograd.gradcheck(distance.double(), small, fast_mode=True)


def test_scales_are_used_as_long_as_the_window_fits():
    sizes = ((10, 64), (11, 64), (22, 22), (44, 50), (512, 512))
    assert [perceptual.num_scales(*size) for size in sizes] == [0, 1, 2, 3, 3]
    kinds = ("structure", "lpips", "lpips_alex")
    assert [perceptual.smallest_side(PerceptualConfig(kind=kind)) for kind in kinds] == [11, 16, 31]
