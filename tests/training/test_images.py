"""The grids of a run: which images they show, in which order, with which words."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny_run import tiny_config, write_images
from vae_dist.config.schema import DataConfig
from vae_dist.data.index import load_index
from vae_dist.data.settings import image_settings
from vae_dist.models.build import build_vae
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.images import to_uint8
from vae_dist.training import images
from vae_dist.training.data import Data
from vae_dist.training.images import ImageLogger

NUM_IMAGES, NUM_SEARCHED, NUM_CLASSES = 12, 10, 3  # in the shards; the first ones that are searched


class Captions:
    def __init__(self):
        self.of = {}

    def image(self, step, key, png_path, caption):
        assert (png_path.name, key[:7]) == (f"{key[7:]}_{step:08d}.png", "images/")
        self.of[key[7:]] = caption


@pytest.fixture(scope="module")
def levels():
    """uint8 (N, 1, 8, 8), each of one grey."""
    greys = torch.linspace(1, 255, NUM_IMAGES).round().to(torch.uint8)
    shuffled = greys[torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(0))]
    return shuffled.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory, levels):
    folder = tmp_path_factory.mktemp("data")
    write_images(folder, levels[:, 0].numpy(), num_classes=NUM_CLASSES)
    index = load_index(str(folder), key="data.train", create=True)
    settings = image_settings(index, DataConfig(channels=1, resolution="native", max_pixels=10**6))
    return Data(index, index, settings)


def model_of(**keys):
    torch.manual_seed(0)
    model = build_vae(tiny_config(kind="discretized_gaussian", **keys), (8, 8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


model = pytest.fixture(scope="module")(lambda: model_of())


def log_images(folder, data, model, *, batch_size=256):
    """The grids of steps 5 and 10; the captions of the latter."""
    config, captions = tiny_config(kind="discretized_gaussian"), Captions()
    config.log.num_images, config.evaluation.batch_size = 6, batch_size
    image_logger = ImageLogger(config, RunFolder(folder / "run"), data, [captions])
    for step in (5, 10):
        image_logger(model, step, {"eval/neg_elbo_nats": 12.5})
    return captions.of


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, data, model):
    """Captions by name, and the pixels of a name and step."""
    folder = tmp_path_factory.mktemp("drawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "NUM_SEARCHED", NUM_SEARCHED)
        captions = log_images(folder, data, model)

    def pixels(name, step=10):
        return np.asarray(Image.open(folder / "run" / "images" / f"{name}_{step:08d}.png"))

    return captions, pixels


def pairs_of(picture):
    """Grey at the centre of each of 2 x 3 cells of 96 pixels."""
    return picture[2 + 48 : 2 + 48 + 99 : 98, 2 + 48 :: 98].astype(int)


def test_every_grid_has_its_words_and_is_the_same_for_the_same_model(drawn):
    captions, pixels = drawn
    grids = {"samples", "reconstructions", "interpolations", "traversals", "by_class", "worst"}
    assert set(captions) == grids
    for name, caption in captions.items():
        assert caption.startswith("step 10 | 12.5 nats")
        assert np.array_equal(pixels(name, 5), pixels(name, 10))
    assert captions["by_class"].endswith("| from the first 10 of 12 images")
    assert "| worst 3 of the first 10 of 12 images: " in captions["worst"]
    assert re.search(r"units [\d, ]+, from -3 to 3", captions["traversals"])


def test_reconstructions_are_of_the_first_images_and_the_worst_come_first(drawn, model, levels):
    captions, pixels = drawn
    with torch.inference_mode():
        shown = model.likelihood.prepare(levels[:NUM_SEARCHED], None)
        mean, log_variance = model.encode(shown)
        params = model.decode(mean, (8, 8))
        rate = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
        nats = rate - model.likelihood.log_prob(params, shown)
        outputs = to_uint8(model.likelihood.mean(params))
    order = nats.argsort(descending=True)[:3]
    for name, chosen in (("reconstructions", torch.arange(3)), ("worst", order)):
        inputs, means = pairs_of(pixels(name))
        assert inputs.tolist() == levels[chosen, 0, 4, 4].tolist()
        assert np.abs(means - outputs[chosen, 0, 4, 4].numpy()).max() <= 1
    most, least = re.findall(r"([\d.]+) to ([\d.]+) nats", captions["worst"])[0]
    assert float(most) == pytest.approx(float(nats[order[0]]), rel=1e-3)
    assert float(least) == pytest.approx(float(nats[order[-1]]), rel=1e-3)


def test_a_class_is_a_row(drawn, levels):
    picture = drawn[1]("by_class")
    for label in range(NUM_CLASSES):
        of_class = levels[label:NUM_SEARCHED:NUM_CLASSES, 0, 4, 4].tolist()
        row = picture[2 + 98 * label + 48]
        inputs = [int(row[2 + 98 * column + 48]) for column in range(0, 10, 2)]
        assert inputs == [*of_class, *[112] * (5 - len(of_class))]  # grey where there is none


def test_no_forward_has_more_images_than_evaluation_allows(tmp_path, data):
    conditional, seen = model_of(num_classes=NUM_CLASSES), []
    for tower in (conditional.encoder, conditional.decoder):
        tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    names = log_images(tmp_path, data, conditional, batch_size=2)
    assert "samples_by_class" in names and max(seen) == 2
