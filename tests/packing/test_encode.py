"""What `encode` writes, through its entry point."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from tests.support import latent_data
from tests.support.distributed import run_ranks
from tests.support.latent_data import SIZES, samples_of, tensors_of, write_photos
from tests.support.picture_sources import contents, encoded, npy, png, write
from tests.support.tiny_run import tiny_config, write_run
from vae_dist import encode
from vae_dist.config.commands import EncodeCommand
from vae_dist.data.index import load_index
from vae_dist.data.writer import ShardWriter, write_shards
from vae_dist.inference.load import load_model

COUNT, DAMAGED = 23, (4, 11)
SMALL = ("shard_mb=0.02", "batch_size=3", "max_skipped_fraction=0.2", "device=cpu", "threads=1")


def keys(run, out, *more):
    return [f"run={run}", f"data={run.parent}/photos", f"out={out}", *SMALL, *more]


def encoded_by(run, out, *more):
    assert encode.main(keys(run, out, *more)) == 0


def model_of(run):
    return load_model(EncodeCommand(run=str(run), device="cpu", data="", out="")).model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A spatial model, and beside it `photos`: 23 samples of three sizes, two of them damaged."""
    work = tmp_path_factory.mktemp("work")
    write_photos(work / "photos", COUNT, damaged=DAMAGED)
    return latent_data.write_spatial_run(work / "run", work / "photos")


@pytest.fixture(scope="module")
def straight(run):
    encoded_by(run, run.parent / "straight")
    return run.parent / "straight"


@pytest.fixture(scope="module")
def wide(run):
    """Moments in float32, of mirrored images too, in several shards."""
    encoded_by(run, run.parent / "wide", "dtype=fp32", "flip=true")
    return run.parent / "wide"


def test_each_sample_once_in_order_with_what_it_carried(wide, tmp_path):
    summary = json.loads((wide / "encode.json").read_text())
    source = write_photos(tmp_path / "again", COUNT, damaged=DAMAGED)
    expected = [sample for i, sample in enumerate(source) if i not in DAMAGED]
    for theirs, ours in zip(samples_of(wide), expected, strict=True):
        assert all(theirs[name] == ours[name] for name in ("__key__", "cls", "json", "clip.txt"))
        assert "png" not in theirs
    assert summary["samples"] == COUNT - 2 and summary["shards"] > 3
    assert len(summary["skipped"]) == 2 and "sample 4: " in summary["skipped"][0]
    assert load_index(str(wide), key="data", create=False).num_samples == COUNT - 2


def test_latents_are_those_of_the_model(run, wide):
    """Each image by itself, through the path that `reconstruct` takes; and their statistics."""
    model, tensors = model_of(run), tensors_of(wide)
    for found, sample in zip(tensors, samples_of(wide), strict=True):
        number = json.loads(sample["json"])["number"]
        source = latent_data.source_image(run.parent / "photos", number)
        height, width = SIZES[number % 3]
        assert found["image_size"].tolist() == [height, width]
        assert found["mean"].shape == (3, height // 2, width // 2)
        prepared = source / 127.5 - 1
        of_both = [*model.encode(prepared), *model.encode(prepared.flip(3))]
        names = ("mean", "log_variance", "mean_flip", "log_variance_flip")
        assert found.keys() == {*names, "image_size"}
        for name, want in zip(names, of_both, strict=True):
            torch.testing.assert_close(found[name], want[0].detach(), rtol=1e-4, atol=1e-5)
    record = json.loads((wide / "latents.json").read_text())
    mean = torch.cat([t["mean"].flatten(1) for t in tensors], 1).double()
    within = torch.cat([t["log_variance"].flatten(1) for t in tensors], 1).double().exp()
    per_channel = mean.var(1, correction=0) + within.mean(1)
    assert record["per_channel"]["mean"] == pytest.approx(mean.mean(1).tolist(), rel=1e-6)
    assert record["per_channel"]["std"] == pytest.approx(per_channel.sqrt().tolist(), rel=1e-6)
    assert record["shift_factor"] == pytest.approx(float(mean.mean()), rel=1e-6)
    total = mean.var(correction=0) + within.mean()
    assert record["scaling_factor"] == pytest.approx(float(total) ** -0.5, rel=1e-6)
    assert (record["num_images"], record["step"], record["weights"]) == (COUNT - 2, 20, "ema")


def test_narrow_types_hold_the_rounded_values(run, tmp_path):
    one_shard = "shard_mb=1"  # so that batches, whose sizes decide the last digits, are the same
    encoded_by(run, tmp_path / "fp32", "dtype=fp32", one_shard)
    for dtype, kind in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        encoded_by(run, tmp_path / dtype, f"dtype={dtype}", one_shard)
        pairs = zip(tensors_of(tmp_path / "fp32"), tensors_of(tmp_path / dtype), strict=True)
        for wide, narrow in pairs:
            for name in ("mean", "log_variance"):
                assert narrow[name].dtype == kind and torch.equal(narrow[name], wide[name].to(kind))


def test_draws_belong_to_seed_and_sample(run, wide, tmp_path):
    """They have the posterior's mean and variance, and neither batch nor shards change them."""
    other, draws, whitened = ("batch_size=5", "shard_mb=1"), [], []
    for name, more in (("a", ["seed=0"]), ("b", ["seed=1"]), ("c", ["seed=0", *other])):
        encoded_by(run, tmp_path / name, "dtype=fp32", "content=sample", *more)
        draws.append(tensors_of(tmp_path / name))
    for sampled, another, again, moments in zip(*draws, tensors_of(wide), strict=True):
        torch.testing.assert_close(sampled["sample"], again["sample"])
        assert not torch.allclose(sampled["sample"], another["sample"])
        assert set(sampled) == {"sample", "image_size"}
        deviation = (0.5 * moments["log_variance"]).exp()
        whitened.append(((sampled["sample"] - moments["mean"]) / deviation).flatten())
    noise = torch.cat(whitened)
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5 and noise.std() == pytest.approx(1, abs=0.05)


def test_kept_images_and_another_resolution(run, tmp_path):
    encoded_by(run, tmp_path / "out", "keep_images=true", "resolution=[8,12]")
    source = write_photos(tmp_path / "again", COUNT, damaged=DAMAGED)
    assert samples_of(tmp_path / "out")[0]["png"] == source[0]["png"]
    assert all(found["image_size"].tolist() == [8, 12] for found in tensors_of(tmp_path / "out"))
    assert encode.main(keys(run, tmp_path / "no", "resolution=big")) == 2


def test_aspect_buckets(tmp_path):
    """Each image at its bucket, in the order of the index, whatever shapes go together."""
    write_photos(tmp_path / "photos", 11)
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    config.data.train = config.data.validation = str(tmp_path / "photos")
    config.data.resolution = {"area": 256, "multiple": 4, "max_aspect": 2.0}
    write_run(tmp_path / "run", config, (16, 16))
    encoded_by(tmp_path / "run", tmp_path / "out")
    found = samples_of(tmp_path / "out")
    assert [json.loads(sample["json"])["number"] for sample in found] == list(range(11))
    for number, latents in enumerate(tensors_of(tmp_path / "out")):
        height, width = (12, 20) if number % 3 == 2 else (16, 16)  # 20x16 is nearer to a square
        assert latents["image_size"].tolist() == [height, width]
        assert latents["mean"].shape == (3, height // 2, width // 2)


def test_sixteen_bits_and_masks(tmp_path):
    """Missing pixels are hidden from the encoder; the mask is carried over, the image is not."""
    samples = []
    for number, seen in enumerate((255, 255, 0)):
        image = np.random.default_rng(number).integers(0, 2**16, (1, 16, 16), dtype=np.uint16)
        mask = encoded(np.full((16, 16), seen, np.uint8))
        samples.append({"__key__": f"{number}", "npy": npy(image), "mask.png": mask})
    write_shards(samples, tmp_path / "photos", num_shards=1)
    config = tiny_config(latent="spatial", kind="gaussian")
    config.data.train = config.data.validation = str(tmp_path / "photos")
    config.data.bits, config.data.mask = 16, "member"
    write_run(tmp_path / "run", config, (16, 16))
    encoded_by(tmp_path / "run", tmp_path / "out", "content=mean", "dtype=fp32", "flip=true")
    assert all(set(s) >= {"mask.png"} and "npy" not in s for s in samples_of(tmp_path / "out"))
    *_, hidden = tensors_of(tmp_path / "out")
    nothing = torch.zeros(1, 1, 16, 16)
    mean, _ = model_of(tmp_path / "run").encode(nothing, None, nothing)
    for name in ("mean", "mean_flip"):
        torch.testing.assert_close(hidden[name], mean[0].detach(), rtol=1e-4, atol=1e-5)


def test_too_much_damage_stops(run, straight, tmp_path, capsys):
    out = tmp_path / "out"
    assert encode.main(keys(run, out, "max_skipped_fraction=0.05")) == 2
    message = capsys.readouterr().err
    assert "2 of 23 images cannot be read" in message and "sample 4: " in message
    assert not (out / "encode.json").exists()
    encoded_by(run, out)  # goes on, with the limit of the other tests
    assert contents(out) == contents(straight)
    for key, problem in (("k" * 90, "give it a shorter key"), ("../../x", "is no relative path")):
        (source := tmp_path / f"{len(key)}").mkdir()
        write(source / "s.tar", {f"{key}.png": png()})
        assert encode.main([*keys(run, source / "out"), f"data={source}"]) == 2
        assert problem in capsys.readouterr().err


def test_a_killed_encode_goes_on(run, straight, tmp_path, capsys):
    """kill -9 while sample 9 is written; then the same command, and refusals of others."""
    out = tmp_path / "out"

    def killed():
        write, count = ShardWriter.write, 0

        def write_or_die(self, sample):
            nonlocal count
            count += 1
            if count == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, sample)

        ShardWriter.write = write_or_die
        encode.main(keys(run, out))

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert whole
    for other, problem in (
        ("content=mean", "another content (moments there, mean here)"),
        ("checkpoint=10", "another step (20 there, 10 here)"),
    ):
        assert encode.main(keys(run, out, other)) == 2
        assert problem in capsys.readouterr().err
    encoded_by(run, out)
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole
    encoded_by(run, out)
    assert "nothing is left to do" in capsys.readouterr().out
    assert contents(out) == contents(straight)


def test_any_number_of_processes_writes_the_same(run, straight, tmp_path):
    """Of the 6 shards, or of a single one: then a rank has nothing to do."""
    encoded_by(run, tmp_path / "one", "shard_mb=10")
    for world, shard_mb, want in ((3, 0.02, straight), (2, 10, tmp_path / "one")):
        out, size = tmp_path / f"{world}", f"shard_mb={shard_mb}"
        assert run_ranks(world, encode.main, keys(run, out, size)) == [0] * world
        assert contents(out) == contents(want)
