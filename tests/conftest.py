"""What tests of several folders share: few digits as shards, and tiny runs for every verb."""

import vae_dist  # noqa: F401  (before torch: tests run beside each other)

# isort: split
import numpy as np
import pytest
import torch

from tests.support.tiny_run import random_pixels, run_with_images, tiny_config, write_images
from vae_dist.data.digits import load_digits


def pytest_collection_modifyitems(items):
    """The folders whose slow files take longest come first, so that processes end together."""
    folders = ["launch", "tracking", "benchmarks"]
    items.sort(key=lambda item: [*folders, item.path.parent.name].index(item.path.parent.name))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """`train`: 512 in 8 shards, `validation`: 64, with ten labels. Not to be changed."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    pixels = load_digits()[0][np.random.default_rng(0).permutation(10_000)]
    write_images(folder / "train", pixels[:512], num_classes=10, num_shards=8)
    write_images(folder / "validation", pixels[512:576], num_classes=10)
    return folder


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory):
    """A vector latent, grey images of 28x28, one of the 8 validation images damaged."""
    pixels = random_pixels(8, 28, 28)
    pixels[2] = 0
    return run_with_images(tmp_path_factory.mktemp("plain"), tiny_config(), pixels)


@pytest.fixture(scope="session")
def conditional_run(tmp_path_factory):
    """Three classes, and of each grey image of 12x10 one half is missing."""
    config = tiny_config(num_classes=3)
    config.data.mask = "half"
    folder = tmp_path_factory.mktemp("conditional")
    return run_with_images(folder, config, random_pixels(6, 12, 10))


@pytest.fixture(scope="session")
def spatial_run(tmp_path_factory):
    """A spatial latent of stride 2, three colour images of 20x16."""
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    return run_with_images(tmp_path_factory.mktemp("spatial"), config, random_pixels(3, 20, 16, 3))


@pytest.fixture(scope="session")
def vision(tmp_path_factory):
    """A DINOv2 of random weights, with patches of 7 pixels and 16 values."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("vision") / "dinov2"
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=7, image_size=28
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder
