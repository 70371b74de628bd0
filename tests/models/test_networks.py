"""Published networks: names and shapes of their parameters, LPIPS against torchmetrics, and what is
said when their weights are missing, damaged or of another network."""

import hashlib
import math
import sys
from pathlib import Path

import pytest
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.models.networks import (
    INCEPTION,
    TRUNKS,
    VGG16,
    FidInception,
    Lpips,
    PretrainedFile,
    alexnet_features,
    fetch,
    load_inception,
    load_lpips,
    vgg16_features,
)


def shapes(network):
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


def test_parameters_are_those_of_the_published_files():
    with torch.device("meta"):
        vgg, alex = shapes(vgg16_features()), shapes(alexnet_features())
        inception = shapes(FidInception())
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    assert list(vgg) == [f"{i}.{kind}" for i in numbers for kind in ("weight", "bias")]
    assert sum(map(math.prod, vgg.values())) == 14_714_688
    sides = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3)}
    sides[10] = (256, 256, 3, 3)
    weights = {name: shape for name, shape in alex.items() if len(shape) == 4}
    assert weights == {f"{i}.weight": shape for i, shape in sides.items()}
    assert len(inception) == 94 * 3  # convolutions, each with a batch norm's scale and shift
    # torchvision's inception_v3 without the auxiliary classifier, less fc of 1,000 classes
    assert sum(map(math.prod, inception.values())) == 23_834_568 - 2048 * 1000 - 1000
    expected = {
        "Conv2d_4a_3x3.bn.bias": (192,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6b.branch7x7_3.conv.weight": (192, 128, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    }
    assert {name: inception.get(name) for name in expected} == expected


@pytest.mark.parametrize(("kind", "net"), [("lpips", "vgg"), ("lpips_alex", "alex")])
def test_lpips_equals_torchmetrics_on_the_same_weights(kind, net, tmp_path, monkeypatch):
    from torchmetrics.functional.image import lpips as oracle

    with torch.device("meta"):
        all_shapes = shapes(Lpips(kind))
    weights = {n: 0.05 * torch.randn(s) for n, s in all_shapes.items() if n.startswith("features")}
    torch.save(weights, tmp_path / "weights.pth")
    ours = load_lpips(kind, tmp_path / "weights.pth")
    monkeypatch.setattr(oracle, "_get_tv_model_features", lambda *_: ours.features)
    # torchmetrics reads its heads without map_location
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: load(*a, **{**k, "map_location": "cpu"}))
    theirs = oracle._LPIPS(net=net, pretrained=True, pnet_rand=True)
    one, other = torch.rand(2, 2, 3, 40, 36, generator=torch.Generator().manual_seed(3)) * 2 - 1
    expected = theirs(one, other).flatten()
    torch.testing.assert_close(ours(one, other), expected, rtol=1e-4, atol=1e-7)
    assert (expected > 0).all() and ours(one, one).tolist() == [0, 0]
    side = TRUNKS[kind].smallest_side
    smallest = one[..., :side, :side]
    assert ours(smallest, smallest).shape == (2,)
    with pytest.raises(RuntimeError):
        ours(smallest[..., :-1], smallest[..., :-1])


def test_a_file_is_checked_before_it_is_read(tmp_path):
    digest = hashlib.sha256(b"weights").hexdigest()
    for sha256 in (digest, digest[::-1]):
        file = PretrainedFile("https://example.invalid/a.pth", sha256)
        (tmp_path / file.name).write_bytes(b"weights")
        if sha256 == digest:
            assert fetch(file, str(tmp_path)) == tmp_path / file.name
            continue
        with pytest.raises(ConfigError, match=r"its SHA-256 is .* damaged or another file"):
            fetch(file, str(tmp_path))


def test_a_missing_file_is_downloaded_or_the_error_says_what_to_fetch(tmp_path, monkeypatch):
    asked = []

    def download(url, path, *, hash_prefix, progress):
        if asked:
            raise OSError("Name or service not known")
        asked.append((url, hash_prefix))
        Path(path).write_bytes(b"")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert fetch(INCEPTION) == tmp_path / "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"
    assert asked == [(INCEPTION.url, INCEPTION.sha256)] and len(INCEPTION.sha256) == 64
    with pytest.raises(ConfigError) as caught:
        fetch(VGG16, str(tmp_path / "weights"))
    for part in (VGG16.url, str(tmp_path / "weights"), "FOLDER of metric_weights="):
        assert part in str(caught.value)


class Evil:
    def __reduce__(self):
        return (sys.exit, ("code was run",))


def test_what_is_read_fits_and_cannot_run_code(tmp_path):
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        load_inception(tmp_path / "evil.pth")
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"of another network: \d+ tensors are missing"):
        load_inception(tmp_path / "other.pth")


@pytest.mark.slow
def test_inception_from_a_file_gives_features_of_images_of_any_size(tmp_path):
    path, network = tmp_path / "pretrained.pth", FidInception()
    state = network.state_dict()
    # as the published file: without counts of steps, with a classifier
    state = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048)}, path)
    images = torch.rand(2, 3, 28, 40)
    found = load_inception(path)(images)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, network.eval()(images))
