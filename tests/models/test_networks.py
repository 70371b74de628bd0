"""Published networks: names and shapes of their parameters, LPIPS against torchmetrics, and what is
said when their weights are missing, damaged or of another network."""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.models.networks import (
    INCEPTION,
    SMALLEST_SIDE,
    VGG16,
    WIDTHS,
    Backbone,
    FidInception,
    Lpips,
    PretrainedFile,
    alexnet_features,
    fetch,
    load_inception,
    load_lpips,
    read_tensors,
    vgg16_features,
)


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


def random_weights(network: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.05 * torch.randn(shape, generator=generator)
        for name, shape in shapes(network).items()
    }


def test_backbones_have_the_parameters_of_torchvision() -> None:
    with torch.device("meta"):
        vgg, alex = shapes(vgg16_features()), shapes(alexnet_features())
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    assert list(vgg) == [f"{i}.{kind}" for i in numbers for kind in ("weight", "bias")]
    assert sum(math.prod(shape) for shape in vgg.values()) == 14_714_688
    weights = {name: shape for name, shape in alex.items() if len(shape) == 4}
    assert weights == {
        "0.weight": (64, 3, 11, 11),
        "3.weight": (192, 64, 5, 5),
        "6.weight": (384, 192, 3, 3),
        "8.weight": (256, 384, 3, 3),
        "10.weight": (256, 256, 3, 3),
    }


def test_inception_has_the_names_of_the_published_file() -> None:
    with torch.device("meta"):
        names = shapes(FidInception())
    assert len(names) == 94 * 3  # convolutions, each with the scale and shift of its batch norm
    # torchvision's inception_v3 without the auxiliary classifier, less fc of 1,000 classes
    num_parameters = sum(math.prod(shape) for shape in names.values())
    assert num_parameters == 23_834_568 - 2048 * 1000 - 1000
    expected = {
        "Conv2d_4a_3x3.bn.bias": (192,),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_1.conv.weight": (64, 288, 1, 1),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6b.branch7x7_3.conv.weight": (192, 128, 7, 1),
        "Mixed_6e.branch7x7dbl_2.conv.weight": (192, 192, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    }
    assert {name: names.get(name) for name in expected} == expected


@pytest.mark.parametrize("backbone", ["vgg", "alex"])
def test_lpips_equals_torchmetrics_on_the_same_weights(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.functional.image import lpips as oracle

    path = tmp_path / "weights.safetensors"
    with torch.device("meta"):
        network = Lpips(backbone)
    weights = {n: w for n, w in random_weights(network).items() if n.startswith("features")}
    safetensors.torch.save_file(weights, path)
    ours = load_lpips(backbone, path)
    features: Any = ours.features
    monkeypatch.setattr(oracle, "_get_tv_model_features", lambda *_: features)
    # torchmetrics reads its heads without map_location
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: load(*a, **{**k, "map_location": "cpu"}))
    theirs = oracle._LPIPS(net=backbone, pretrained=True, pnet_rand=True)
    pair = torch.rand(2, 2, 3, 40, 36, generator=torch.Generator().manual_seed(3)) * 2 - 1
    expected = theirs(pair[0], pair[1]).flatten()
    torch.testing.assert_close(ours(pair[0], pair[1]), expected, rtol=1e-4, atol=1e-7)
    assert (expected > 0).all()
    assert ours(pair[0], pair[0]).tolist() == [0, 0]


@pytest.mark.parametrize("backbone", list(WIDTHS))
def test_the_smallest_image_is_the_smallest(backbone: Backbone) -> None:
    network = Lpips(backbone)
    side = SMALLEST_SIDE[backbone]
    images = torch.rand(1, 3, side, side)
    assert network(images, images).shape == (1,)
    with pytest.raises(RuntimeError):
        network(images[..., :-1], images[..., :-1])


def local(folder: Path, data: bytes, *, sha256: str = "") -> PretrainedFile:
    digest = sha256 or hashlib.sha256(data).hexdigest()
    file = PretrainedFile("a network", f"https://example.invalid/net-{digest}.pth", digest, 1)
    (folder / file.name).write_bytes(data)
    return file


def test_a_file_is_checked_before_it_is_read(tmp_path: Path) -> None:
    file = local(tmp_path, b"weights")
    assert fetch(file, tmp_path) == tmp_path / file.name
    damaged = local(tmp_path, b"weights", sha256="01234567")
    with pytest.raises(ConfigError, match=r"its SHA-256 is .* damaged or another file"):
        fetch(damaged, tmp_path)


@pytest.mark.parametrize("network", [True, False])
def test_a_missing_file_is_downloaded_or_the_error_says_what_to_fetch(
    network: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(url: str, path: str, *, hash_prefix: str, progress: bool) -> None:
        if not network:
            raise OSError("Name or service not known")
        asked.append((url, hash_prefix))
        Path(path).write_bytes(b"")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    if network:
        assert fetch(INCEPTION) == tmp_path / "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"
        assert asked == [(INCEPTION.url, INCEPTION.sha256)] and len(INCEPTION.sha256) == 64
        return
    with pytest.raises(ConfigError) as caught:
        fetch(VGG16, tmp_path / "weights")
    for part in (VGG16.url, str(tmp_path / "weights"), "528 MB", "metric_weights=FOLDER", "VGG16"):
        assert part in str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (sys.exit, ("code was run",))


def test_what_is_read_fits_and_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        read_tensors(tmp_path / "evil.pth")
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, other)
    with pytest.raises(ConfigError, match=r"of another network: .* tensors are missing"):
        load_inception(other)


@pytest.mark.slow
def test_inception_from_a_file_gives_features_of_images_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.safetensors"
    network = FidInception()
    state = network.state_dict()
    # as the published file: without counts of steps, with a classifier
    state = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    safetensors.torch.save_file(state | {"fc.weight": torch.zeros(1008, 2048)}, path)
    loaded = load_inception(path)
    images = torch.rand(2, 3, 28, 40)
    assert loaded(images).shape == (2, 2048)
    torch.testing.assert_close(loaded(images), network.eval()(images))
