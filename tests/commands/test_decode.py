"""From latents back to images: `decode` through its entry point, `encode` before it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.latent_data import (
    SIZES,
    samples_of,
    source_image,
    tensors_of,
    write_photos,
    write_spatial_run,
)
from tests.support.tiny_run import random_pixels, tiny_config, write_images, write_run
from vae_dist import decode, encode
from vae_dist.config.commands import CheckpointCommand
from vae_dist.data.writer import write_shards
from vae_dist.inference import tiles
from vae_dist.inference.load import load_model
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.vae import VAE
from vae_dist.tracking.images import to_uint8

Printed = pytest.CaptureFixture[str]


def words(run: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [f"run={run}", f"data={data}", f"out={out}", "device=cpu", *more]


def encoded(run: Path, data: Path, out: Path, *more: str) -> list[dict[str, torch.Tensor]]:
    """Exactly: no rounding stands between."""
    assert encode.main(words(run, data, out, "dtype=fp32", "threads=1", *more)) == 0
    return tensors_of(out)


def model_of(run: Path) -> VAE:
    return load_model(CheckpointCommand(run=str(run))).model


def pixels_of(path: Path) -> np.ndarray:
    found: np.ndarray = np.array(Image.open(path)).astype(int)
    return found


def test_decoded_latents_are_the_reconstructions(tmp_path: Path) -> None:
    """Of images of three sizes; a grid is these, too."""
    photos, latents = tmp_path / "photos", tmp_path / "latents"
    write_photos(photos, 6)
    run = write_spatial_run(tmp_path / "run", photos)
    encoded(run, photos, latents)
    assert decode.main(words(run, latents, tmp_path / "decoded")) == 0
    pictures = sorted((tmp_path / "decoded").glob("*.png"))
    assert [path.stem for path in pictures[:2]] == ["000000-part0_0000", "000001-part0_0001"]
    for number, path in enumerate(pictures):
        source = source_image(photos, number)
        assert source.shape[2:] == SIZES[number % 3]
        expected = to_uint8(BatchedVAE(model_of(run)).reconstruct(source))[0]
        found = pixels_of(path).transpose(2, 0, 1)
        assert np.abs(found - expected.numpy()).max() <= 1 and found.std() > 1
    assert decode.main(words(run, latents, tmp_path / "grid.png", "num_images=1")) == 0
    height, width = SIZES[0]
    grid = pixels_of(tmp_path / "grid.png")[2:-2:4, 2:-2:4]  # enlarged four times
    assert (grid == pixels_of(pictures[0])).all() and grid.shape[:2] == (height, width)


def test_single_images_hold_every_channel_and_level(tmp_path: Path) -> None:
    config = tiny_config(latent="spatial", kind="gaussian", channels=2)
    config.data.bits = 16
    run, levels = tmp_path / "run", np.arange(2 * 8 * 6, dtype=np.uint16).reshape(2, 8, 6) * 600
    file = io.BytesIO()
    np.save(file, levels)
    write_shards([{"__key__": "a", "npy": file.getvalue()}], tmp_path / "data", num_shards=1)
    write_run(run, config, (8, 6))
    encoded(run, tmp_path / "data", tmp_path / "latents")
    assert decode.main(words(run, tmp_path / "latents", tmp_path / "out")) == 0
    found = np.load(tmp_path / "out" / "000000-a.npy")
    expected = BatchedVAE(model_of(run)).reconstruct(torch.from_numpy(levels)[None])[0]
    assert found.dtype == np.uint16 and found.shape == (2, 8, 6)
    np.testing.assert_allclose(found, (expected.clamp(-1, 1).numpy() + 1) * 32767.5, atol=1)


def test_decode_refuses_what_is_not_its_own(
    spatial_run: Path, tmp_path: Path, capsys: Printed
) -> None:
    images, out = spatial_run.parent / "images", tmp_path / "a.png"
    encoded(spatial_run, images, tmp_path / "latents")
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    config.model.latent_channels = 5
    write_run(tmp_path / "other", config, SIZES[0])
    for run, data, reason in (
        (spatial_run, images, "it has no .latent.safetensors"),
        (tmp_path / "other", tmp_path / "latents", "does not fit this model"),
    ):
        assert decode.main(words(run, data, out)) == 2
        assert reason in capsys.readouterr().err
    assert decode.main(words(spatial_run, tmp_path / "latents", out, "seed=1")) == 2
    assert "seed" in capsys.readouterr().err  # which would draw nothing


def test_a_vector_latent_with_labels(tmp_path: Path, capsys: Printed) -> None:
    """Both towers are told the label, which decode reads from the carried .cls member."""
    pixels = random_pixels(5, 28, 28)
    write_images(tmp_path / "digits", pixels, num_classes=3)
    config = tiny_config(num_classes=3)
    config.likelihood.binarization = "soft"
    write_run(tmp_path / "run", config, (28, 28))
    run, latents, out = (tmp_path / name for name in ("run", "latents", "decoded"))
    found = encoded(run, tmp_path / "digits", latents)
    labels = torch.tensor([int(sample["cls"]) for sample in samples_of(latents)])
    assert labels.tolist() == [0, 1, 2, 0, 1]
    vae, shown = BatchedVAE(model_of(run)), torch.from_numpy(pixels)[:, None]
    mean, _ = vae.encode(shown, labels)
    torch.testing.assert_close(torch.stack([one["mean"] for one in found]), mean)
    assert decode.main(words(run, latents, out)) == 0
    expected = to_uint8(vae.reconstruct(shown, labels)).numpy()[:, 0]
    decoded = np.stack([pixels_of(path) for path in sorted(out.glob("*.png"))])
    assert np.abs(decoded - expected).max() <= 1
    for main in (encode.main, decode.main):
        assert main(words(run, latents, tmp_path / "tiled", "tile=8")) == 2
        assert "a vector latent holds the whole image" in capsys.readouterr().err


def test_large_images_in_tiles(tmp_path: Path, capsys: Printed) -> None:
    """The latents are those of `tiles.encode`, not those of the whole image."""
    photos, out = tmp_path / "photos", tmp_path / "latents"
    write_photos(photos, 2, sizes=[(48, 72)])
    run = write_spatial_run(tmp_path / "run", photos)
    native = ("resolution=native", "tile=32")
    stored: Any = encoded(run, photos, out, *native)
    whole = encoded(run, photos, tmp_path / "whole", "resolution=native")
    for keys, reason in (
        (("resolution=native", "tile=16"), "another tile (32 there, 16 here)"),
        (("resolution=native", "tile=4"), "too few to overlap; give at least tile=16"),
    ):
        assert encode.main(words(run, photos, out, *keys)) == 2
        assert reason in capsys.readouterr().err
    model, sources = model_of(run), torch.cat([source_image(photos, i) for i in range(2)])
    mean, log_variance = tiles.encode(model, sources / 127.5 - 1, tile=32)
    z = torch.stack([one["mean"] for one in stored])
    torch.testing.assert_close(z, mean, rtol=1e-5, atol=1e-5)
    found = torch.stack([one["log_variance"] for one in stored])
    torch.testing.assert_close(found, log_variance, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(z[0], whole[0]["mean"], atol=1e-4)
    assert decode.main(words(run, out, tmp_path / "pictures", "tile=32")) == 0
    expected = to_uint8(model.likelihood.mean(tiles.decode(model, z, (48, 72), tile=32)))
    pictures = sorted((tmp_path / "pictures").glob("*.png"))
    decoded = np.stack([pixels_of(path) for path in pictures])
    np.testing.assert_array_equal(decoded, expected.permute(0, 2, 3, 1).numpy())
