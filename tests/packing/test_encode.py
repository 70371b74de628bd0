"""`encode`, of latents and of features, and `decode`, through their entry points."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.distributed import run_ranks
from tests.support.latent_data import (
    SIZES,
    samples_of,
    source_image,
    tensors_of,
    write_photos,
    write_spatial_run,
)
from tests.support.picture_sources import contents, encoded, npy, png, write
from tests.support.tiny_run import random_pixels, tiny_config, write_images, write_run
from vae_dist import decode, encode
from vae_dist.config.commands import CheckpointCommand
from vae_dist.data.features import MEMBER, Features
from vae_dist.data.index import load_index
from vae_dist.data.reader import SampleReader
from vae_dist.data.transforms import ImageSettings
from vae_dist.inference.load import load_model
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.likelihoods.base import Levels
from vae_dist.objectives.alignment import load_features
from vae_dist.tracking.images import to_uint8

COUNT, DAMAGED = 23, (4, 11)
NUMBERS = [number for number in range(COUNT) if number not in DAMAGED]
SMALL = ("shard_mb=0.02", "batch_size=3", "max_skipped_fraction=0.2", "device=cpu", "threads=1")


def keys(run, out, *more):
    return [f"run={run}", f"data={run.parent}/photos", f"out={out}", *SMALL, *more]


def encoded_by(run, out, *more):
    assert encode.main(keys(run, out, *more)) == 0
    return tensors_of(out)


def decoded_by(run, latents, out, *more):
    assert decode.main([f"run={run}", f"data={latents}", f"out={out}", "device=cpu", *more]) == 0
    paths = sorted(out.glob("*.png")) if out.is_dir() else [out]
    return [np.array(Image.open(path)).astype(int) for path in paths]


def model_of(run):
    return load_model(CheckpointCommand(run=str(run))).model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A spatial model, and beside it `photos`: samples of three sizes, two of them damaged."""
    work = tmp_path_factory.mktemp("work")
    write_photos(work / "photos", COUNT, damaged=DAMAGED)
    return write_spatial_run(work / "run", work / "photos")


@pytest.fixture(scope="module")
def straight(run):
    encoded_by(run, run.parent / "straight")
    return run.parent / "straight"


@pytest.fixture(scope="module")
def wide(run):
    """Moments in float32, of mirrored images too, in several shards."""
    encoded_by(run, run.parent / "wide", "dtype=fp32", "flip=true")
    return run.parent / "wide"


def test_latents_are_those_of_the_model_and_decoded_to_reconstructions(run, wide, tmp_path):
    """Each sample once, in order, with what it carried; each image by itself."""
    model, photos = model_of(run), run.parent / "photos"
    pictures = decoded_by(run, wide, tmp_path / "out")
    stored = zip(tensors_of(wide), samples_of(wide), pictures, NUMBERS, strict=True)
    for found, sample, picture, number in stored:
        names = ("__key__", "cls", "json", "clip.txt")
        assert all(sample[name] == samples_of(photos)[number][name] for name in names)
        assert "png" not in sample
        height, width = SIZES[number % 3]
        assert found["image_size"].tolist() == [height, width]
        assert found["mean"].shape == (3, height // 2, width // 2)
        image = source_image(photos, number)
        of_both = [*model.encode(image / 127.5 - 1), *model.encode(image.flip(3) / 127.5 - 1)]
        names = ("mean", "log_variance", "mean_flip", "log_variance_flip")
        assert found.keys() == {*names, "image_size"}
        for name, want in zip(names, of_both, strict=True):
            torch.testing.assert_close(found[name], want[0].detach(), rtol=1e-4, atol=1e-5)
        expected = to_uint8(BatchedVAE(model).reconstruct(image))[0].permute(1, 2, 0).numpy()
        assert np.abs(picture - expected).max() <= 1 and picture.std() > 1
    names = sorted(path.stem for path in (tmp_path / "out").iterdir())
    assert (names[0], names[4]) == ("000000-part0_0000", "000004-part1_0005")
    (grid,) = decoded_by(run, wide, tmp_path / "grid.png", "num_images=1")
    assert (grid[2:-2:4, 2:-2:4] == pictures[0]).all()  # enlarged four times


def test_summary_and_statistics(straight, wide):
    summary = json.loads((wide / "encode.json").read_text())
    assert summary["samples"] == COUNT - 2 and summary["shards"] > 3
    assert len(summary["skipped"]) == 2 and "sample 4: " in summary["skipped"][0]
    assert load_index(str(wide), key="data", create=False).num_samples == COUNT - 2
    record, tensors = json.loads((wide / "latents.json").read_text()), tensors_of(wide)
    mean = torch.cat([t["mean"].flatten(1) for t in tensors], 1).double()
    within = torch.cat([t["log_variance"].flatten(1) for t in tensors], 1).double().exp()
    std = (mean.var(1, correction=0) + within.mean(1)).sqrt()
    assert record["per_channel"]["mean"] == pytest.approx(mean.mean(1).tolist(), rel=1e-6)
    assert record["per_channel"]["std"] == pytest.approx(std.tolist(), rel=1e-6)
    assert record["shift_factor"] == pytest.approx(float(mean.mean()), rel=1e-6)
    total = mean.var(correction=0) + within.mean()
    assert record["scaling_factor"] == pytest.approx(float(total) ** -0.5, rel=1e-6)
    assert (record["num_images"], record["step"], record["weights"]) == (COUNT - 2, 20, "ema")
    for narrow, exact in zip(tensors_of(straight), tensors, strict=True):
        assert narrow["mean"].dtype == torch.float16
        torch.testing.assert_close(narrow["mean"].float(), exact["mean"], rtol=2e-3, atol=1e-4)


def test_a_vector_latent_with_labels(tmp_path, capsys):
    """Both towers see the label, which decode reads from the carried .cls member."""
    pixels, config = random_pixels(5, 28, 28), tiny_config(num_classes=3)
    write_images(tmp_path / "photos", pixels, num_classes=3)
    config.likelihood.binarization = "soft"
    write_run(tmp_path / "run", config, (28, 28))
    run, latents, labels = tmp_path / "run", tmp_path / "latents", torch.tensor([0, 1, 2, 0, 1])
    found = torch.stack([one["mean"] for one in encoded_by(run, latents, "dtype=fp32")])
    vae, images = BatchedVAE(model_of(run)), torch.from_numpy(pixels)[:, None]
    torch.testing.assert_close(found, vae.encode(images, labels)[0])
    pictures = np.stack(decoded_by(run, latents, tmp_path / "decoded"))
    assert np.abs(pictures - to_uint8(vae.reconstruct(images, labels)).numpy()[:, 0]).max() <= 1
    assert decode.main([f"run={run}", f"data={latents}", "tile=8"]) == 2
    assert "a vector latent holds the whole image" in capsys.readouterr().err


def test_large_images_in_tiles_and_kept(tmp_path):
    samples = write_photos(tmp_path / "photos", 2, sizes=[(48, 72)])
    run, latents = write_spatial_run(tmp_path / "run", tmp_path / "photos"), tmp_path / "latents"
    more = ("dtype=fp32", "resolution=native", "tile=32", "keep_images=true")
    stored = encoded_by(run, latents, *more)
    assert [sample["png"] for sample in samples_of(latents)] == [one["png"] for one in samples]
    vae = BatchedVAE(model_of(run), tile=32)
    images = torch.cat([source_image(tmp_path / "photos", i) for i in range(2)])
    found = torch.stack([one["mean"] for one in stored])
    torch.testing.assert_close(found, vae.encode(images)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, BatchedVAE(vae.model).encode(images)[0], atol=1e-4)
    pictures = np.stack(decoded_by(run, latents, tmp_path / "pictures", "tile=32"))
    of_tiles = to_uint8(vae.decode(found, (48, 72)))
    np.testing.assert_array_equal(pictures, of_tiles.permute(0, 2, 3, 1).numpy())


def test_draws_belong_to_seed_and_sample(run, wide, tmp_path):
    """They have the posterior's mean and variance, and neither batch nor shards change them."""
    more, whitened = ("dtype=fp32", "content=sample", "flip=true"), []
    first = encoded_by(run, tmp_path / "a", *more)
    second = encoded_by(run, tmp_path / "b", *more, "seed=1")
    again = encoded_by(run, tmp_path / "c", *more, "batch_size=5", "shard_mb=1")
    for a, b, c, moments in zip(first, second, again, tensors_of(wide), strict=True):
        torch.testing.assert_close(a["sample"], c["sample"])
        assert not torch.allclose(a["sample"], b["sample"])
        assert set(a) == {"sample", "sample_flip", "image_size"}
        for end in ("", "_flip"):
            deviation = (0.5 * moments[f"log_variance{end}"]).exp()
            centered = a[f"sample{end}"] - moments[f"mean{end}"]
            whitened.append((centered / deviation).flatten())
    assert not torch.allclose(whitened[0], whitened[1], atol=1e-2)
    noise = torch.cat(whitened)
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5 and noise.std() == pytest.approx(1, abs=0.05)


def test_aspect_buckets_and_another_resolution(run, tmp_path):
    """Each image at its bucket, in the order of the index, whatever shapes go together."""
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    config.data.resolution = {"area": 256, "multiple": 4, "max_aspect": 2.0}
    write_run(tmp_path / "run", config, (16, 16))
    out, photos = tmp_path / "out", f"data={run.parent}/photos"
    found = encoded_by(tmp_path / "run", out, photos, "dtype=bf16")
    numbers = [json.loads(sample["json"])["number"] for sample in samples_of(out)]
    for number, latents, want in zip(numbers, found, NUMBERS, strict=True):
        height, width = (12, 20) if want % 3 == 2 else (16, 16)  # 20x16 is nearer to a square
        assert (number, latents["image_size"].tolist()) == (want, [height, width])
        assert latents["mean"].shape == (3, height // 2, width // 2)
        assert latents["mean"].dtype == torch.bfloat16
    sizes = [one["image_size"] for one in encoded_by(run, tmp_path / "b", "resolution=[8,12]")]
    assert torch.stack(sizes).unique(dim=0).tolist() == [[8, 12]]


def test_sixteen_bits_and_masks(tmp_path):
    """Missing pixels are hidden from the encoder; the mask is carried over, the image is not."""
    image = np.random.default_rng(0).integers(0, 2**16, (1, 16, 16), dtype=np.uint16)
    mask = np.pad(np.full((16, 8), 255, np.uint8), ((0, 0), (8, 0)))  # the right half was observed
    write(tmp_path / "photos/s.tar", {"0.npy": npy(image), "0.mask.png": encoded(mask)})
    config = tiny_config(latent="spatial", kind="gaussian")
    config.data.bits, config.data.mask = 16, "member"
    write_run(tmp_path / "run", config, (16, 16))
    more = ("content=mean", "dtype=fp32", "flip=true")
    (found,) = encoded_by(tmp_path / "run", tmp_path / "out", *more)
    (sample,) = samples_of(tmp_path / "out")
    assert "mask.png" in sample and "npy" not in sample
    observed = torch.from_numpy(mask / 255).float()[None, None]
    seen = Levels(16).centers(torch.from_numpy(image.astype(np.int64))[None]) * observed
    for name, dims in (("mean", []), ("mean_flip", [3])):
        mean, _ = model_of(tmp_path / "run").encode(seen.flip(dims), None, observed.flip(dims))
        torch.testing.assert_close(found[name], mean[0].detach(), rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / "out/latents.json").read_text())  # of means alone
    assert record["scaling_factor"] == pytest.approx(1 / float(found["mean"].std(correction=0)))


def test_an_encode_that_ends_early_goes_on(run, straight, tmp_path, capsys):
    """Of too much damage; and refusals of other commands."""
    out = tmp_path / "out"
    for key, message in (
        ("max_skipped_fraction=0.05", "2 of 23 images cannot be read"),
        ("content=mean", "other content (moments there, mean here)"),
        ("checkpoint=10", "other step (20 there, 10 here)"),
        ("tile=16", "other tile (0 there, 16 here)"),
        ("dtype=bf16", "other dtype (fp16 there, bf16 here)"),
        ("flip=true", "other flip (false there, true here)"),
    ):
        assert encode.main(keys(run, out, key)) == 2
        assert message in capsys.readouterr().err
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert whole and not (out / "encode.json").exists()
    for _ in range(2):
        encoded_by(run, out)
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole
    assert "nothing is left to do" in capsys.readouterr().out
    assert contents(out) == contents(straight)


def test_any_number_of_processes_writes_the_same(run, straight, tmp_path):
    """Of the 6 shards, or of a single one: then a rank has nothing to do."""
    encoded_by(run, tmp_path / "one", "shard_mb=10")
    for world, shard_mb, want in ((3, 0.02, straight), (2, 10, tmp_path / "one")):
        out, size = tmp_path / f"{world}", f"shard_mb={shard_mb}"
        assert run_ranks(world, encode.main, keys(run, out, size)) == [0] * world
        assert contents(out) == contents(want)


def test_what_is_refused(run, straight, plain_run, tmp_path, capsys):
    long = write(tmp_path / "long/s.tar", {"k" * 90 + ".png": png()}).parent
    outside = write(tmp_path / "outside/s.tar", {"../../x.png": png()}).parent
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    config.model.latent_channels = 5
    write_run(tmp_path / "other", config, SIZES[0])
    for k, (verb, more, message) in enumerate(
        (
            (encode, ["tile=4"], "give at least tile=16"),
            (encode, [f"run={plain_run}", "tile=8"], "a vector latent holds the whole image"),
            (encode, [f"data={long}"], "give it a shorter key"),
            (encode, [f"data={outside}"], "is no relative path"),
            (decode, [], "it has no .latent.safetensors"),
            (decode, ["out=/proc"], "out=/proc is not empty"),
            (decode, [f"run={tmp_path}/other", f"data={straight}"], "does not fit this model"),
        )
    ):
        arguments = [f"run={run}", f"data={run.parent}/photos", f"out={tmp_path}/{k}", *more]
        assert verb.main([*arguments, "device=cpu"]) == 2
        assert message in capsys.readouterr().err


def features_keys(vision, data, out, *more):
    return [f"features={vision}", f"data={data}", f"out={out}", *SMALL, *more]


@pytest.mark.parametrize("resolution", ["native", "[14,21]"])
def test_features_of_what_training_shows(resolution, run, vision, tmp_path):
    photos = run.parent / "photos"
    words = features_keys(vision, photos, tmp_path / "out", f"resolution={resolution}")
    assert encode.main(words) == 0
    summary = json.loads((tmp_path / "out/encode.json").read_text())
    assert (summary["samples"], summary["width"]) == (COUNT - 2, 16) and summary["shards"] > 3
    model = load_features(str(vision), torch.device("cpu"))
    index = load_index(str(photos), key="data", create=False)
    size = None if resolution == "native" else (14, 21)
    settings = ImageSettings(3, size or SIZES[0], size is not None, 2**16, any_size=size is None)
    reader, samples = SampleReader(index, settings, seed=0), samples_of(photos)
    for number, found in zip(NUMBERS, samples_of(tmp_path / "out"), strict=True):
        names = set(samples[number]) - {"__url__", "__local_path__"}
        assert all(found[name] == samples[number][name] for name in names)
        assert set(found) == {*samples[number], MEMBER}
        of_image = Features.from_bytes(found[MEMBER])
        height, width = size or SIZES[number % 3]
        assert of_image[1:] == (str(vision), f"{height}x{width}", "")
        (place,) = reader.in_order(number, number + 1)
        image = reader.load(reader.read([place])[0], place.shard, place.start, epoch=0).image
        values = model(torch.from_numpy(image.copy())[None] / 127.5 - 1)[0]
        np.testing.assert_allclose(of_image.values, values, rtol=2e-3, atol=2e-3)


def test_features_of_one_of_several_images_and_refusals(vision, tmp_path, capsys):
    clear = encoded(np.full((28, 28, 4), (9, 9, 9, 0), np.uint8))
    several = write(tmp_path / "several/s.tar", {"0.a.png": clear, "0.b.png": b""}).parent
    done = {"0.png": png(), f"0.{MEMBER.title()}": b""}  # a suffix as readers take it
    twice = write(tmp_path / "twice/s.tar", done).parent
    for k, (data, more, message) in enumerate(
        (
            (several, [], "choose with data.image_key=a.png"),
            (several, ["image_key=a.png"], "transparent"),
            (twice, [], f"it has a .{MEMBER} already"),
            (several, [f"features={tmp_path}"], "no vision model can be loaded from there"),
            (several, ["dtype=fp32"], "dtype=fp32 has no effect with run="),
        )
    ):
        assert encode.main(features_keys(vision, data, tmp_path / f"{k}", *more)) == 2
        assert message in capsys.readouterr().err
    more = ("image_key=a.png", "background=white")
    assert encode.main(features_keys(vision, several, tmp_path / "out", *more)) == 0
    (found,) = samples_of(tmp_path / "out")
    assert Features.from_bytes(found[MEMBER])[1:] == (str(vision), "28x28", "a.png")
