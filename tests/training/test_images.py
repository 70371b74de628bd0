"""The grids of a run: which images they show, in which order, with which words."""

import re
from types import SimpleNamespace

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

NUM_IMAGES, NUM_SEARCHED, NUM_CLASSES = 12, 10, 3  # in the shards; the first ones that are searched


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The grids of steps 5 and 10, and what they are of: images uint8 (N, 1, 8, 8) of one grey."""
    folder, found = tmp_path_factory.mktemp("drawn"), SimpleNamespace(captions={}, batches=[])
    torch.manual_seed(0)
    greys = torch.linspace(1, 255, NUM_IMAGES).round().to(torch.uint8)[torch.randperm(NUM_IMAGES)]
    found.images = greys.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    write_images(folder, found.images[:, 0].numpy(), num_classes=NUM_CLASSES)
    index = load_index(str(folder), key="data.train", create=True)
    settings = image_settings(index, DataConfig(channels=1, resolution="native", max_pixels=10**6))
    config = tiny_config(kind="discretized_gaussian", num_classes=NUM_CLASSES)
    config.log.num_images, config.evaluation.batch_size = 6, 4
    found.model = build_vae(config, (8, 8)).eval()
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def image(step, key, png_path, caption):
        assert (png_path.name, key[:7]) == (f"{key[7:]}_{step:08d}.png", "images/")
        found.captions[key[7:]] = caption

    for tower in (found.model.encoder, found.model.decoder):
        tower.register_forward_pre_hook(lambda _, inputs: found.batches.append(len(inputs[0])))
    data, sink = Data(index, index, settings), SimpleNamespace(image=image)
    draw = images.ImageLogger(config, RunFolder(folder / "run"), data, [sink])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "NUM_SEARCHED", NUM_SEARCHED)
        for step in (5, 10):
            draw(found.model, step, {"eval/neg_elbo_nats": 12.5})
    found.folder = folder / "run" / "images"
    return found


def pixels(drawn, name, step=10):
    return np.asarray(Image.open(drawn.folder / f"{name}_{step:08d}.png"))


def test_every_grid_has_its_words_and_is_the_same_for_the_same_model(drawn):
    grids = {"samples", "reconstructions", "interpolations", "traversals", "by_class", "worst"}
    assert set(drawn.captions) == grids | {"samples_by_class"}
    for name, caption in drawn.captions.items():
        assert caption.startswith("step 10 | 12.5 nats")
        assert np.array_equal(pixels(drawn, name, 5), pixels(drawn, name))
    assert drawn.captions["by_class"].endswith("| from the first 10 of 12 images")
    assert "| worst 3 of the first 10 of 12 images: " in drawn.captions["worst"]
    assert re.search(r"units [\d, ]+, from -3 to 3", drawn.captions["traversals"])
    assert max(drawn.batches) == 4  # evaluation.batch_size


def test_reconstructions_are_of_the_first_images_and_the_worst_come_first(drawn):
    model, labels = drawn.model, torch.arange(NUM_SEARCHED) % NUM_CLASSES
    with torch.inference_mode():
        shown = model.likelihood.prepare(drawn.images[:NUM_SEARCHED], None)
        mean, log_variance = model.encode(shown, labels)
        params = model.decode(mean, (8, 8), labels)
        rate = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
        nats = rate - model.likelihood.log_prob(params, shown)
        outputs = to_uint8(model.likelihood.mean(params))
    order = nats.argsort(descending=True)[:3]
    for name, chosen in (("reconstructions", torch.arange(3)), ("worst", order)):
        # grey at the centre of each of 2 x 3 cells of 96 pixels
        inputs, means = pixels(drawn, name)[50:149:98, 50::98].astype(int)
        assert inputs.tolist() == drawn.images[chosen, 0, 4, 4].tolist()
        assert np.abs(means - outputs[chosen, 0, 4, 4].numpy()).max() <= 1
    most, least = re.findall(r"([\d.]+) to ([\d.]+) nats", drawn.captions["worst"])[0]
    assert float(most) == pytest.approx(float(nats[order[0]]), rel=1e-3)
    assert float(least) == pytest.approx(float(nats[order[-1]]), rel=1e-3)


def test_a_class_is_a_row(drawn):
    for label, row in enumerate(pixels(drawn, "by_class")[50::98, 50::196]):
        of_class = drawn.images[label:NUM_SEARCHED:NUM_CLASSES, 0, 4, 4].tolist()
        assert row.tolist() == [*of_class, *[112] * (5 - len(of_class))]  # grey: there is none
