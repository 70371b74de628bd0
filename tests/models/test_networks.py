"""Published networks: names and shapes of their parameters, and what is said when their weights are
missing, damaged or of another network."""

import hashlib
import math
import sys
from pathlib import Path

import pytest
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.models import networks


def test_parameters_are_those_of_the_published_files():
    kinds = networks.vgg16_features, networks.alexnet_features, networks.FidInception
    with torch.device("meta"):
        vgg, alex, inception = (
            {name: tuple(p.shape) for name, p in kind().named_parameters()} for kind in kinds
        )
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    assert list(vgg) == [f"{i}.{kind}" for i in numbers for kind in ("weight", "bias")]
    assert list(alex) == [f"{i}.{kind}" for i in (0, 3, 6, 8, 10) for kind in ("weight", "bias")]
    assert len(inception) == 94 * 3  # convolutions, each with a batch norm's scale and shift
    # torchvision's inception_v3 without the auxiliary classifier, less fc of 1,000 classes
    sizes = [sum(map(math.prod, network.values())) for network in (vgg, alex, inception)]
    assert sizes == [14_714_688, 2_469_696, 23_834_568 - 2048 * 1000 - 1000]
    expected = {
        "Conv2d_4a_3x3.bn.bias": (192,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6b.branch7x7_3.conv.weight": (192, 128, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    }
    assert expected.items() <= inception.items()


def test_a_file_is_downloaded_and_checked_or_the_error_says_what_to_fetch(tmp_path, monkeypatch):
    asked = []

    def download(url, path, *, hash_prefix, progress):
        if asked:
            raise OSError("Name or service not known")
        asked.append((url, hash_prefix))
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    sha256, folder = hashlib.sha256(b"weights").hexdigest(), tmp_path / "weights"
    file = networks.PretrainedFile("https://example.invalid/a.pth", sha256)
    assert networks.fetch(file) == tmp_path / "hub/checkpoints/a.pth"
    assert asked == [(file.url, sha256)]
    with pytest.raises(ConfigError) as caught:
        networks.fetch(file, str(folder))
    assert all(text in str(caught.value) for text in (file.url, str(folder), "metric_weights="))
    (folder / "a.pth").write_bytes(b"weights")
    assert networks.fetch(file, str(folder)) == folder / "a.pth"
    with pytest.raises(ConfigError, match=r"its SHA-256 is .* damaged or another file"):
        networks.fetch(file._replace(sha256=sha256[::-1]), str(folder))


def test_what_is_read_fits_and_cannot_run_code(tmp_path):
    other = {"features.0.weight": torch.zeros(64, 3, 3, 3)}
    for content, fragment in (
        ({"weight": sys.exit}, "cannot be read as weights"),  # a function, not a tensor
        (other, r"of another network: \d+ tensors are missing"),
    ):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(ConfigError, match=fragment):
            networks.load_inception(tmp_path / "weights.pth")


@pytest.mark.slow
def test_inception_from_a_file_gives_features_of_images_of_any_size(tmp_path):
    path, network = tmp_path / "pretrained.pth", networks.FidInception()
    # as the published file: without counts of steps, with a classifier
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("batches_tracked")}
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048)}, path)
    images = torch.rand(2, 3, 28, 40)
    found = networks.load_inception(path)(images)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, network.eval()(images))
