"""The grids of a run: which images they show, in which order, with which words."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny_run import tiny_config
from vae_dist.config.schema import DataConfig
from vae_dist.data.index import load_index
from vae_dist.data.settings import image_settings
from vae_dist.data.writer import write_shards
from vae_dist.models.build import build_vae
from vae_dist.models.vae import VAE
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.images import to_uint8
from vae_dist.training.images import ImageLogger
from vae_dist.training.plan import Data

NUM_IMAGES, NUM_SEARCHED = 12, 10  # in the shards; the first ones that grids search
LABELS = [0, 1, 2]


class Captions:
    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def log(self, step, row):
        raise AssertionError

    def image(self, step: int, key: str, png_path: Path, caption: str) -> None:
        assert (png_path.name, key[:7]) == (f"{key[7:]}_{step:08d}.png", "images/")
        self.of[key[7:]] = caption

    def close(self, status):
        raise AssertionError


@pytest.fixture(scope="module")
def levels() -> torch.Tensor:
    """uint8 (N, 1, 8, 8), each of one grey."""
    greys = torch.linspace(0, 255, NUM_IMAGES).round().to(torch.uint8)
    return greys[torch.randperm(NUM_IMAGES)].view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, levels: torch.Tensor) -> Data:
    def png(image: torch.Tensor) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(file, "PNG")
        return file.getvalue()

    folder = tmp_path_factory.mktemp("data")
    samples = (
        {"__key__": f"{i:04d}", "png": png(image), "cls": str(LABELS[i % len(LABELS)]).encode()}
        for i, image in enumerate(levels)
    )
    write_shards(samples, folder, num_shards=1, name="images")
    index = load_index(str(folder), key="data.train", create=True)
    settings = image_settings(index, DataConfig(channels=1, resolution="native", max_pixels=10**6))
    return Data(index, index, settings)


@pytest.fixture(scope="module")
def model() -> VAE:
    torch.manual_seed(0)
    model = build_vae(tiny_config(kind="discretized_gaussian"), (8, 8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def log_images(folder: Path, data: Data, model: VAE, *, batch_size: int = 256) -> dict[str, str]:
    """The grids of steps 5 and 10; the captions of the latter."""
    config, captions = tiny_config(kind="discretized_gaussian"), Captions()
    config.log.num_images, config.evaluation.batch_size = 6, batch_size
    image_logger = ImageLogger(config, RunFolder(folder / "run"), data, [captions])
    for step in (5, 10):
        image_logger(model, step, {"eval/neg_elbo_nats": 12.5})
    image_logger.close()
    return captions.of


class Drawn(NamedTuple):
    folder: Path
    captions: dict[str, str]

    def pixels(self, name: str, step: int = 10) -> np.ndarray:
        return np.asarray(Image.open(self.folder / "run" / "images" / f"{name}_{step:08d}.png"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, data: Data, model: VAE) -> Drawn:
    folder = tmp_path_factory.mktemp("drawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vae_dist.training.images.NUM_SEARCHED", NUM_SEARCHED)
        return Drawn(folder, log_images(folder, data, model))


def greys(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Grey at the centre of each cell of a grid of 96-pixel cells."""
    found = np.empty((rows, columns), int)
    tops = [2 + row * 98 + 8 * (row // 2) for row in range(rows)]  # pairs are 10 apart, else 2
    for row, top in enumerate(tops):
        for column in range(columns):
            found[row, column] = picture[top + 48, 2 + column * 98 + 48]
    return found


def test_every_grid_has_its_words_and_is_the_same_for_the_same_model(drawn: Drawn) -> None:
    captions = drawn.captions
    assert set(captions) == {
        *("samples", "reconstructions", "interpolations", "traversals", "by_class", "worst")
    }
    for name, caption in captions.items():
        assert caption.startswith("step 10 | 12.5 nats")
        assert np.array_equal(drawn.pixels(name, 5), drawn.pixels(name, 10))
    assert captions["by_class"].endswith("| from the first 10 of 12 images")
    assert "| worst 3 of the first 10 of 12 images: " in captions["worst"]
    assert re.search(r"units [\d, ]+, from -3 to 3", captions["traversals"])


def test_reconstructions_are_of_the_first_images(
    drawn: Drawn, model: VAE, levels: torch.Tensor
) -> None:
    cells = greys(drawn.pixels("reconstructions"), 2, 3)
    assert cells[0].tolist() == levels[:3, 0, 4, 4].tolist()
    with torch.inference_mode():
        mean = model.encode(model.likelihood.prepare(levels[:3], None))[0]
        means = to_uint8(model.likelihood.mean(model.decode(mean, (8, 8))))
    assert np.abs(cells[1] - means[:, 0, 4, 4].numpy()).max() <= 1


def test_the_worst_come_first(drawn: Drawn, model: VAE, levels: torch.Tensor) -> None:
    with torch.inference_mode():
        images = model.likelihood.prepare(levels[:NUM_SEARCHED], None)
        mean, log_variance = model.encode(images)
        params = model.decode(mean, (8, 8))
        rate = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
        nats = rate - model.likelihood.log_prob(params, images)
    order = nats.argsort(descending=True)[:3]
    cells = greys(drawn.pixels("worst"), 2, 3)
    assert cells[0].tolist() == levels[order, 0, 4, 4].tolist()
    most, least = re.findall(r"([\d.]+) to ([\d.]+) nats", drawn.captions["worst"])[0]
    assert float(most) == pytest.approx(float(nats[order[0]]), rel=1e-3)
    assert float(least) == pytest.approx(float(nats[order[-1]]), rel=1e-3)


def test_a_class_is_a_row(drawn: Drawn, levels: torch.Tensor) -> None:
    picture = drawn.pixels("by_class")
    for label in LABELS:
        of_class = levels[label : NUM_SEARCHED : len(LABELS), 0, 4, 4].tolist()
        row = picture[2 + 98 * label + 48]
        inputs = [int(row[2 + 98 * column + 48]) for column in range(0, 10, 2)]
        assert inputs == [*of_class, *[112] * (5 - len(of_class))]  # grey where there is none


def test_no_forward_has_more_images_than_evaluation_allows(tmp_path: Path, data: Data) -> None:
    config = tiny_config(kind="discretized_gaussian")
    config.model.num_classes = len(LABELS)
    conditional = build_vae(config, (8, 8)).eval()
    seen: list[int] = []
    for tower in (conditional.encoder, conditional.decoder):
        tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    names = log_images(tmp_path, data, conditional, batch_size=2)
    assert "samples_by_class" in names and max(seen) == 2
