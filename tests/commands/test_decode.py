"""From latents back to images: `decode` through its entry point, `encode` before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.encoding import (
    encoded,
    keys,
    photo_run,
    source_image,
    tensors_of,
)
from tests.support.latent_data import SIZES, write_photos, write_spatial_run
from tests.support.tiny_run import tiny_config, write_images, write_run
from vae_dist import decode, encode, reconstruct
from vae_dist.config.commands import EncodeCommand
from vae_dist.inference import tiles
from vae_dist.inference.load import load_model, open_images
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.tracking.images import to_uint8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_run(tmp_path_factory.mktemp("work"))


def test_decoded_latents_are_the_reconstructions(tmp_path: Path) -> None:
    """Of undamaged images, so that both count alike; fp32, so that no rounding stands between."""
    write_photos(tmp_path / "photos", 6)
    run = write_spatial_run(tmp_path / "run", tmp_path / "photos")
    encoded(run, tmp_path / "latents", "dtype=fp32")
    folder, data = tmp_path / "decoded", f"data={tmp_path}/latents"
    assert decode.main([f"run={run}", data, f"out={folder}", "device=cpu"]) == 0
    command = EncodeCommand(run=str(run), device="cpu", data="", out="")
    model = load_model(command).model
    pictures = sorted(folder.glob("*.png"))
    assert [path.stem for path in pictures[:2]] == ["000000-part0_0000", "000001-part0_0001"]
    for number, path in enumerate(pictures):
        source = source_image(run.parent / "photos", number)
        mean, _ = model.encode(source / 127.5 - 1)
        picture = model.likelihood.mean(model.decode(mean, SIZES[number % 3]))[0]
        expected = ((picture + 1) * 127.5).round().clamp(0, 255)
        found = np.array(Image.open(path)).transpose(2, 0, 1).astype(int)
        assert np.abs(found - expected.detach().numpy()).max() <= 1
        assert found.std() > 1


def test_the_grid_shows_what_reconstruct_shows(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 4, sizes=[(100, 104)])
    run = write_spatial_run(tmp_path / "run", tmp_path / "photos")
    encoded(run, tmp_path / "latents", "dtype=fp32")
    decoded, pairs = tmp_path / "decoded.png", tmp_path / "pairs.png"
    data = f"data={tmp_path}/latents"
    assert decode.main([f"run={run}", data, f"out={decoded}", "num_images=4", "device=cpu"]) == 0
    assert reconstruct.main([f"run={run}", f"out={pairs}", "num_images=4", "device=cpu"]) == 0
    ours, theirs = (
        np.array(Image.open(decoded)).astype(int),
        np.array(Image.open(pairs)).astype(int),
    )
    assert ours.shape == (2 * 102 + 2, 2 * 106 + 2, 3)
    below = theirs[2 + 102 :][:100]  # the first row of reconstructions
    width = min(ours.shape[1], below.shape[1])
    assert np.abs(ours[2:102, :width] - below[:, :width])[:, 2:106].max() <= 1


def test_decode_refuses_what_is_not_its_own(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = f"data={run.parent}/photos"
    assert decode.main([f"run={run}", photos, f"out={tmp_path}/a.png", "device=cpu"]) == 2
    assert "it has no .latent.safetensors" in capsys.readouterr().err
    encoded(run, tmp_path / "latents")
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    config.data.train = config.data.validation = str(run.parent / "photos")
    config.model.latent_channels = 5
    write_run(tmp_path / "other", config, SIZES[0])
    keys = [f"run={tmp_path}/other", f"data={tmp_path}/latents", f"out={tmp_path}/a.png"]
    assert decode.main([*keys, "device=cpu"]) == 2
    assert "does not fit this model" in capsys.readouterr().err


def test_a_vector_latent_with_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both towers are told the label, which decode reads from the carried .cls member."""
    pixels = np.random.default_rng(0).integers(1, 256, (5, 28, 28), dtype=np.uint8)
    write_images(tmp_path / "digits", pixels)
    config = tiny_config(num_classes=3)
    config.data.train = config.data.validation = str(tmp_path / "digits")
    config.likelihood.binarization = "soft"
    write_run(tmp_path / "run", config, (28, 28))
    run, data = f"run={tmp_path}/run", f"data={tmp_path}/digits"
    assert encode.main([run, data, f"out={tmp_path}/latents", "dtype=fp32", "device=cpu"]) == 0
    found = tensors_of(tmp_path / "latents")
    assert [tuple(t["mean"].shape) for t in found] == [(3,)] * 5
    loaded = load_model(EncodeCommand(run=f"{tmp_path}/run", device="cpu", data="", out=""))
    assert open_images(loaded.config, "", create=False).index.num_samples == 5
    mean, _ = BatchedVAE(loaded.model).encode(torch.from_numpy(pixels)[:, None])
    torch.testing.assert_close(torch.stack([t["mean"] for t in found]), mean.cpu())
    out = f"out={tmp_path}/decoded"
    assert decode.main([run, f"data={tmp_path}/latents", out, "device=cpu"]) == 0
    assert len(list((tmp_path / "decoded").glob("*.png"))) == 5
    assert encode.main([run, data, f"out={tmp_path}/tiled", "tile=8", "device=cpu"]) == 2
    assert "a vector latent holds the whole image" in capsys.readouterr().err
    assert decode.main([run, f"data={tmp_path}/latents", out, "tile=8", "device=cpu"]) == 2
    assert "a vector latent holds the whole image" in capsys.readouterr().err


def test_large_images_in_tiles(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The latents are those of `tiles.encode`, not those of the whole image."""
    write_photos(tmp_path / "photos", 2, sizes=[(48, 72)])
    native = (f"data={tmp_path}/photos", "resolution=native", "dtype=fp32")
    out, whole = tmp_path / "out", tmp_path / "whole"
    encoded(run, out, *native, "tile=32")
    encoded(run, whole, *native)
    assert encode.main(keys(run, out, *native, "tile=16")) == 2
    assert "another tile (32 there, 16 here)" in capsys.readouterr().err
    model = load_model(EncodeCommand(run=str(run), device="cpu", data="", out="")).model
    stored = tensors_of(out)
    for number, (latents, untiled) in enumerate(zip(stored, tensors_of(whole), strict=True)):
        source = source_image(tmp_path / "photos", number)
        prepared = source / 127.5 - 1
        mean, log_variance = tiles.encode(model, prepared, tile=32)
        torch.testing.assert_close(latents["mean"], mean[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(latents["log_variance"], log_variance[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(latents["mean"], untiled["mean"], atol=1e-4)
    pictures = tmp_path / "pictures"
    data = [f"run={run}", f"data={out}", f"out={pictures}", "device=cpu"]
    assert decode.main([*data, "tile=32"]) == 0
    z = torch.stack([one["mean"] for one in stored])
    params = tiles.decode(model, z, (48, 72), tile=32)
    expected = to_uint8(model.likelihood.mean(params)).permute(0, 2, 3, 1).numpy()
    found = np.stack([np.array(Image.open(path)) for path in sorted(pictures.glob("*.png"))])
    np.testing.assert_array_equal(found, expected)
    assert encode.main(keys(run, tmp_path / "small", *native, "tile=4")) == 2
    assert "too few to overlap; give at least tile=16" in capsys.readouterr().err
