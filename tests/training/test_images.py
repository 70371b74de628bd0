"""The grids of a run: which images they show, in which order, with which words."""

from __future__ import annotations

import re
from pathlib import Path

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

NUM_IMAGES = 12  # in the shards; the grids search the first 10
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


@pytest.fixture
def data(tmp_path: Path, levels: torch.Tensor) -> Data:
    samples = (
        {"__key__": f"{i:04d}", "png": _png(image), "cls": str(LABELS[i % len(LABELS)]).encode()}
        for i, image in enumerate(levels)
    )
    write_shards(samples, tmp_path / "shards", num_shards=1, name="images")
    index = load_index(str(tmp_path / "shards"), key="data.train", create=True)
    settings = image_settings(
        index,
        DataConfig(channels=1, resolution="native", max_pixels=10**6, crop="center", flip=False),
    )
    return Data(index, index, settings)


def _png(image: torch.Tensor) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(image[0].numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    model = build_vae(tiny_config(kind="discretized_gaussian"), (8, 8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def log_images(
    tmp_path: Path, data: Data, model: VAE, *steps: int, batch_size: int = 256
) -> dict[str, str]:
    config, captions = tiny_config(kind="discretized_gaussian"), Captions()
    config.log.num_images, config.evaluation.batch_size = 6, batch_size
    folder = RunFolder(tmp_path / "run")
    image_logger = ImageLogger(config, folder, data, [captions])
    for step in steps:
        image_logger(model, step, {"eval/neg_elbo_nats": 12.5})
    image_logger.close()
    return captions.of


def shown(tmp_path: Path, name: str, step: int = 5) -> np.ndarray:
    return np.asarray(Image.open(tmp_path / "run" / "images" / f"{name}_{step:08d}.png"))


def greys(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Grey at the centre of each cell of a grid of 96-pixel cells."""
    found = np.empty((rows, columns), int)
    tops = [2 + row * 98 + 8 * (row // 2) for row in range(rows)]  # pairs are 10 apart, else 2
    for row, top in enumerate(tops):
        for column in range(columns):
            found[row, column] = picture[top + 48, 2 + column * 98 + 48]
    return found


def test_every_grid_has_its_words(tmp_path: Path, data: Data, model: VAE, monkeypatch) -> None:
    monkeypatch.setattr("vae_dist.training.images.NUM_SEARCHED", 10)
    captions = log_images(tmp_path, data, model, 5)
    assert set(captions) == {
        *("samples", "reconstructions", "interpolations", "traversals", "by_class", "worst")
    }
    for caption in captions.values():
        assert caption.startswith("step 5 | 12.5 nats")
    assert captions["by_class"].endswith("| from the first 10 of 12 images")
    assert "| worst 3 of the first 10 of 12 images: " in captions["worst"]
    assert re.search(r"units [\d, ]+, from -3 to 3", captions["traversals"])


def test_reconstructions_are_of_the_first_images(
    tmp_path: Path, data: Data, model: VAE, levels: torch.Tensor
) -> None:
    log_images(tmp_path, data, model, 5)
    cells = greys(shown(tmp_path, "reconstructions"), 2, 3)
    assert cells[0].tolist() == levels[:3, 0, 4, 4].tolist()
    with torch.inference_mode():
        mean = model.encode(model.likelihood.prepare(levels[:3], None))[0]
        means = to_uint8(model.likelihood.mean(model.decode(mean, (8, 8))))
    assert np.abs(cells[1] - means[:, 0, 4, 4].numpy()).max() <= 1


def test_the_worst_come_first(
    tmp_path: Path, data: Data, model: VAE, levels: torch.Tensor, monkeypatch
) -> None:
    monkeypatch.setattr("vae_dist.training.images.NUM_SEARCHED", 10)
    captions = log_images(tmp_path, data, model, 5)
    with torch.inference_mode():
        images = model.likelihood.prepare(levels[:10], None)
        mean, log_variance = model.encode(images)
        params = model.decode(mean, (8, 8))
        rate = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
        nats = rate - model.likelihood.log_prob(params, images)
    order = nats.argsort(descending=True)[:3]
    cells = greys(shown(tmp_path, "worst"), 2, 3)
    assert cells[0].tolist() == levels[order, 0, 4, 4].tolist()
    most, least = re.findall(r"([\d.]+) to ([\d.]+) nats", captions["worst"])[0]
    assert float(most) == pytest.approx(float(nats[order[0]]), rel=1e-3)
    assert float(least) == pytest.approx(float(nats[order[-1]]), rel=1e-3)


def test_a_class_is_a_row(tmp_path: Path, data: Data, model: VAE, levels: torch.Tensor) -> None:
    log_images(tmp_path, data, model, 5)
    picture = shown(tmp_path, "by_class")
    for label in LABELS:
        of_class = levels[label :: len(LABELS), 0, 4, 4].tolist()  # 4 images of each
        row = picture[2 + 98 * label + 48]
        inputs = [int(row[2 + 98 * column + 48]) for column in range(0, 10, 2)]
        assert inputs == [*of_class, 112]  # grey where there is none


def test_the_same_model_gives_the_same_pictures(tmp_path: Path, data: Data, model: VAE) -> None:
    names = log_images(tmp_path, data, model, 5, 10)
    for name in names:
        assert np.array_equal(shown(tmp_path, name, 5), shown(tmp_path, name, 10))


def test_no_forward_has_more_images_than_evaluation_allows(tmp_path: Path, data: Data) -> None:
    config = tiny_config(kind="discretized_gaussian")
    config.model.num_classes = len(LABELS)
    conditional = build_vae(config, (8, 8)).eval()
    seen: list[int] = []
    for tower in (conditional.encoder, conditional.decoder):
        tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    names = log_images(tmp_path, data, conditional, 5, batch_size=2)
    assert "samples_by_class" in names and max(seen) == 2
