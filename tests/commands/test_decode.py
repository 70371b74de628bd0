"""From latents back to images: `decode` through its entry point, `encode` before it."""

import numpy as np
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
from vae_dist.inference import tiles
from vae_dist.inference.load import load_model
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.tracking.images import to_uint8


def words(run, data, out, *more):
    return [f"run={run}", f"data={data}", f"out={out}", "device=cpu", *more]


def encoded(run, data, out, *more):
    """Exactly: no rounding stands between."""
    assert encode.main(words(run, data, out, "dtype=fp32", "threads=1", *more)) == 0
    return tensors_of(out)


def decoded(run, data, out, *more):
    assert decode.main(words(run, data, out, *more)) == 0
    paths = sorted(out.glob("*.png")) if out.is_dir() else [out]
    return [np.array(Image.open(path)).astype(int) for path in paths]


def model_of(run):
    return load_model(CheckpointCommand(run=str(run))).model


def test_decoded_latents_are_the_reconstructions(tmp_path):
    """Of images of three sizes; a grid is these, too."""
    photos, latents, out = tmp_path / "photos", tmp_path / "latents", tmp_path / "decoded"
    write_photos(photos, 6)
    run = write_spatial_run(tmp_path / "run", photos)
    encoded(run, photos, latents)
    pictures = decoded(run, latents, out)
    names = sorted(path.stem for path in out.glob("*.png"))
    assert names[:2] == ["000000-part0_0000", "000001-part0_0001"]
    for number, picture in enumerate(pictures):
        source = source_image(photos, number)
        assert source.shape[2:] == SIZES[number % 3]
        expected = to_uint8(BatchedVAE(model_of(run)).reconstruct(source))[0]
        found = picture.transpose(2, 0, 1)
        assert np.abs(found - expected.numpy()).max() <= 1 and found.std() > 1
    (grid,) = decoded(run, latents, tmp_path / "grid.png", "num_images=1")
    assert (grid[2:-2:4, 2:-2:4] == pictures[0]).all()  # enlarged four times


def test_a_vector_latent_with_labels(tmp_path, capsys):
    """Both towers are told the label, which decode reads from the carried .cls member."""
    pixels, config = random_pixels(5, 28, 28), tiny_config(num_classes=3)
    write_images(tmp_path / "digits", pixels, num_classes=3)
    config.likelihood.binarization = "soft"
    write_run(tmp_path / "run", config, (28, 28))
    run, latents = tmp_path / "run", tmp_path / "latents"
    found = encoded(run, tmp_path / "digits", latents)
    labels = torch.tensor([int(sample["cls"]) for sample in samples_of(latents)])
    assert labels.tolist() == [0, 1, 2, 0, 1]
    vae, shown = BatchedVAE(model_of(run)), torch.from_numpy(pixels)[:, None]
    mean, _ = vae.encode(shown, labels)
    torch.testing.assert_close(torch.stack([one["mean"] for one in found]), mean)
    expected = to_uint8(vae.reconstruct(shown, labels)).numpy()[:, 0]
    pictures = np.stack(decoded(run, latents, tmp_path / "decoded"))
    assert np.abs(pictures - expected).max() <= 1
    for main in (encode.main, decode.main):
        assert main(words(run, latents, tmp_path / "tiled", "tile=8")) == 2
        assert "a vector latent holds the whole image" in capsys.readouterr().err


def test_large_images_in_tiles(tmp_path):
    """Latents and pictures are those of `tiles`."""
    photos, latents = tmp_path / "photos", tmp_path / "latents"
    write_photos(photos, 2, sizes=[(48, 72)])
    run = write_spatial_run(tmp_path / "run", photos)
    stored = encoded(run, photos, latents, "resolution=native", "tile=32")
    model, sources = model_of(run), torch.cat([source_image(photos, i) for i in range(2)])
    expected = tiles.encode(model, sources / 127.5 - 1, tile=32)
    for name, value in zip(("mean", "log_variance"), expected, strict=True):
        found = torch.stack([one[name] for one in stored])
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], model.encode(sources / 127.5 - 1)[0], atol=1e-4)
    z = torch.stack([one["mean"] for one in stored])
    pictures = np.stack(decoded(run, latents, tmp_path / "pictures", "tile=32"))
    of_tiles = to_uint8(model.likelihood.mean(tiles.decode(model, z, (48, 72), tile=32)))
    np.testing.assert_array_equal(pictures, of_tiles.permute(0, 2, 3, 1).numpy())


def test_what_is_refused(spatial_run, tmp_path, capsys):
    images, latents = spatial_run.parent / "images", tmp_path / "latents"
    encoded(spatial_run, images, latents)
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    config.model.latent_channels = 5
    write_run(tmp_path / "other", config, SIZES[0])
    for main, run, data, key, reason in (
        (decode.main, spatial_run, images, "tile=0", "it has no .latent.safetensors"),
        (decode.main, tmp_path / "other", latents, "tile=0", "does not fit this model"),
        (decode.main, spatial_run, latents, "seed=1", "seed"),  # which would draw nothing
        (encode.main, spatial_run, images, "tile=16", "another tile (0 there, 16 here)"),
        (encode.main, spatial_run, images, "tile=4", "give at least tile=16"),
    ):
        assert main(words(run, data, latents, key)) == 2
        assert reason in capsys.readouterr().err
