"""What `encode` writes, through its entry point."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.distributed import run_ranks
from tests.support.encoding import (
    COUNT,
    DAMAGED,
    encoded,
    files_of,
    keys,
    photo_run,
    samples_of,
    source_image,
    tensors_of,
)
from tests.support.latent_data import SIZES, write_photos, write_spatial_run
from tests.support.picture_sources import png, write
from tests.support.tiny_run import tiny_config, write_run
from vae_dist import decode, encode
from vae_dist.config.commands import EncodeCommand
from vae_dist.data.index import load_index
from vae_dist.data.writer import ShardWriter, write_shards
from vae_dist.inference.load import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_run(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def wide(run: Path) -> Path:
    """Moments in float32, in several shards."""
    encoded(run, run.parent / "wide", "dtype=fp32")
    return run.parent / "wide"


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert encode.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(key in text for key in ("content=moments", "dtype=fp16", "keep_images=false"))
    assert decode.main(["--help"]) == 0
    assert "num_images=64" in capsys.readouterr().out


def test_each_sample_once_in_order_with_what_it_carried(wide: Path, tmp_path: Path) -> None:
    summary = json.loads((wide / "encode.json").read_text())
    source = write_photos(tmp_path / "again", COUNT, damaged=DAMAGED)
    expected = [sample for i, sample in enumerate(source) if i not in DAMAGED]
    found = samples_of(wide)
    assert [sample["__key__"] for sample in found] == [sample["__key__"] for sample in expected]
    for theirs, ours in zip(found, expected, strict=True):
        assert all(theirs[name] == ours[name] for name in ("cls", "json", "clip.txt"))
        assert "png" not in theirs
    assert summary["samples"] == COUNT - 2 and summary["shards"] > 3
    assert len(summary["skipped"]) == 2 and "sample 4: " in summary["skipped"][0]
    assert load_index(str(wide), key="data", create=False).num_samples == COUNT - 2


def test_latents_are_those_of_the_model(run: Path, wide: Path) -> None:
    """Each image by itself, through the path that `reconstruct` takes."""
    command = EncodeCommand(run=str(run), device="cpu", data="", out="")
    loaded = load_model(command)
    for found, sample in zip(tensors_of(wide), samples_of(wide), strict=True):
        number = json.loads(sample["json"])["number"]
        source = source_image(run.parent / "photos", number)
        height, width = SIZES[number % 3]
        assert found["image_size"].tolist() == [height, width]
        mean, log_variance = loaded.model.encode(source / 127.5 - 1)
        assert found["mean"].shape == (3, height // 2, width // 2)
        torch.testing.assert_close(found["mean"], mean[0].detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found["log_variance"], log_variance[0].detach(), rtol=1e-4, atol=1e-5
        )


def test_narrow_types_hold_the_rounded_values(run: Path, tmp_path: Path) -> None:
    one_shard = "shard_mb=1"  # so that batches, whose sizes decide the last digits, are the same
    encoded(run, tmp_path / "fp32", "dtype=fp32", one_shard)
    for dtype, kind in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        encoded(run, tmp_path / dtype, f"dtype={dtype}", one_shard)
        pairs = zip(tensors_of(tmp_path / "fp32"), tensors_of(tmp_path / dtype), strict=True)
        for wide, narrow in pairs:
            for name in ("mean", "log_variance"):
                assert narrow[name].dtype == kind and torch.equal(narrow[name], wide[name].to(kind))


def test_draws_belong_to_seed_and_sample(run: Path, wide: Path, tmp_path: Path) -> None:
    """They have the posterior's mean and variance, and neither batch nor shards change them."""
    draws = []
    for seed in range(2):
        encoded(run, tmp_path / f"{seed}", "dtype=fp32", "content=sample", f"seed={seed}")
        draws.append(tensors_of(tmp_path / f"{seed}"))
    other = ("dtype=fp32", "content=sample", "seed=0", "batch_size=5", "shard_mb=1")
    encoded(run, tmp_path / "other", *other)
    whitened = []
    for at, sampled in enumerate(tensors_of(tmp_path / "other")):
        torch.testing.assert_close(sampled["sample"], draws[0][at]["sample"])
        assert not torch.allclose(sampled["sample"], draws[1][at]["sample"])
        assert set(sampled) == {"sample", "image_size"}
        moments = tensors_of(wide)[at]
        deviation = (0.5 * moments["log_variance"]).exp()
        whitened.append(((sampled["sample"] - moments["mean"]) / deviation).flatten())
    noise = torch.cat(whitened)
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5 and noise.std() == pytest.approx(1, abs=0.05)


def test_mirrored_images(run: Path, tmp_path: Path) -> None:
    encoded(run, tmp_path / "out", "dtype=fp32", "flip=true", "content=mean")
    loaded = load_model(EncodeCommand(run=str(run), device="cpu", data="", out=""))
    found = tensors_of(tmp_path / "out")[1]
    source = source_image(run.parent / "photos", 1)
    prepared = source / 127.5 - 1
    mean, _ = loaded.model.encode(prepared.flip(3))
    torch.testing.assert_close(found["mean_flip"], mean[0].detach(), rtol=1e-4, atol=1e-5)
    assert set(found) == {"mean", "mean_flip", "image_size"}


def test_the_statistics_are_those_of_the_latents(wide: Path) -> None:
    record = json.loads((wide / "latents.json").read_text())
    found = tensors_of(wide)
    mean = torch.cat([t["mean"].flatten(1) for t in found], 1).double()
    within = torch.cat([t["log_variance"].flatten(1) for t in found], 1).double().exp()
    per_channel = mean.var(1, correction=0) + within.mean(1)
    assert record["per_channel"]["mean"] == pytest.approx(mean.mean(1).tolist(), rel=1e-6)
    assert record["per_channel"]["std"] == pytest.approx(per_channel.sqrt().tolist(), rel=1e-6)
    assert record["shift_factor"] == pytest.approx(float(mean.mean()), rel=1e-6)
    total = mean.var(correction=0) + within.mean()
    assert record["scaling_factor"] == pytest.approx(float(total) ** -0.5, rel=1e-6)
    assert (record["num_images"], record["step"], record["weights"]) == (COUNT - 2, 20, "ema")


def test_kept_images_and_another_resolution(run: Path, tmp_path: Path) -> None:
    summary = encoded(run, tmp_path / "out", "keep_images=true", "resolution=[8,12]")
    source = write_photos(tmp_path / "again", COUNT, damaged=DAMAGED)
    assert samples_of(tmp_path / "out")[0]["png"] == source[0]["png"]
    assert summary["image_sizes"] == {"8x12": COUNT - 2}
    assert encode.main(keys(run, tmp_path / "no", "resolution=big")) == 2


def test_aspect_buckets(tmp_path: Path) -> None:
    """Each image at its bucket, in the order of the index, whatever shapes go together."""
    write_photos(tmp_path / "photos", 11)
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    config.data.train = config.data.validation = str(tmp_path / "photos")
    config.data.resolution = {"area": 256, "multiple": 4, "max_aspect": 2.0}
    write_run(tmp_path / "run", config, (16, 16))
    summary = encoded(tmp_path / "run", tmp_path / "out")
    assert summary["image_sizes"] == {"16x16": 8, "12x20": 3}  # 20x16 is nearer to a square
    found = samples_of(tmp_path / "out")
    assert [json.loads(sample["json"])["number"] for sample in found] == list(range(11))
    for latents in tensors_of(tmp_path / "out"):
        height, width = latents["image_size"].tolist()
        assert latents["mean"].shape == (3, height // 2, width // 2)
        assert 0.7 < height * width / 256 < 1.4


def test_sixteen_bits_and_masks(tmp_path: Path) -> None:
    """Missing pixels are hidden from the encoder; the mask is carried over, the image is not."""
    generator = np.random.default_rng(0)
    samples: list[dict[str, str | bytes]] = []
    for number, seen in enumerate((255, 255, 0)):
        image, mask = io.BytesIO(), io.BytesIO()
        np.save(image, generator.integers(0, 2**16, (1, 16, 16), dtype=np.uint16))
        Image.fromarray(np.full((16, 16), seen, np.uint8)).save(mask, "PNG")
        files = {"npy": image.getvalue(), "mask.png": mask.getvalue()}
        samples.append({"__key__": f"{number}", **files})
    write_shards(samples, tmp_path / "photos", num_shards=1)
    config = tiny_config(latent="spatial", kind="gaussian")
    config.data.train = config.data.validation = str(tmp_path / "photos")
    config.data.bits, config.data.mask = 16, "member"
    write_run(tmp_path / "run", config, (16, 16))
    encoded(tmp_path / "run", tmp_path / "out", "content=mean", "dtype=fp32", "flip=true")
    assert all(set(s) >= {"mask.png"} and "npy" not in s for s in samples_of(tmp_path / "out"))
    *_, hidden = tensors_of(tmp_path / "out")
    model = load_model(EncodeCommand(run=f"{tmp_path}/run", device="cpu", data="", out="")).model
    nothing = torch.zeros(1, 1, 16, 16)
    mean, _ = model.encode(nothing, None, nothing)
    torch.testing.assert_close(hidden["mean"], mean[0].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden["mean_flip"], mean[0].detach(), rtol=1e-4, atol=1e-5)


# damage, kills, and several processes


def test_too_much_damage_stops(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert encode.main(keys(run, out, "max_skipped_fraction=0.05")) == 2
    message = capsys.readouterr().err
    assert "2 of 23 images cannot be read" in message and "sample 4: " in message
    assert not (out / "encode.json").exists()
    encoded(run, out)  # goes on, with the limit of the other tests
    encoded(run, tmp_path / "fresh")
    assert files_of(out) == files_of(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("k" * 90, "give it a shorter key"),
        ("../../x", "the key '../../x' of a sample is no relative path without .."),
        ("/x", "is no relative path"),
    ],
)
def test_keys_that_a_tar_may_not_name(
    run: Path, tmp_path: Path, key: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s").mkdir()
    write(tmp_path / "s/s.tar", {f"{key}.png": png()})
    assert encode.main([*keys(run, tmp_path / "out"), f"data={tmp_path}/s"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("at", [1, 9])
def test_a_killed_encode_goes_on(
    run: Path, tmp_path: Path, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 while sample `at` is written; then the same command, and refusals of others."""
    out = tmp_path / "out"

    def killed() -> None:
        write, count = ShardWriter.write, 0

        def write_or_die(self: ShardWriter, sample: Any) -> None:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, sample)

        ShardWriter.write = write_or_die  # type: ignore[method-assign]
        encode.main(keys(run, out))

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert bool(whole) == (at > 1)
    assert encode.main(keys(run, out, "content=mean")) == 2
    assert "another content (moments there, mean here)" in capsys.readouterr().err
    assert encode.main(keys(run, out, "checkpoint=10")) == 2
    assert "another step (20 there, 10 here)" in capsys.readouterr().err
    encoded(run, out)
    capsys.readouterr()
    assert not (out / ".job").exists()
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole
    encoded(run, out)
    assert "nothing is left to do" in capsys.readouterr().out
    assert encode.main(keys(run, out, "dtype=bf16")) == 2
    assert "another dtype (fp16 there, bf16 here)" in capsys.readouterr().err
    encoded(run, tmp_path / "straight")
    assert files_of(out) == files_of(tmp_path / "straight")


@pytest.mark.parametrize(("world", "shard_mb"), [(3, 0.02), (2, 10)])
def test_any_number_of_processes_writes_the_same(
    run: Path, tmp_path: Path, world: int, shard_mb: float
) -> None:
    """Of the 6 shards, or of a single one: then a rank has nothing to do."""
    size = f"shard_mb={shard_mb}"
    encoded(run, tmp_path / "one", size)
    assert run_ranks(world, encode.main, keys(run, tmp_path / "many", size)) == [0] * world
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


def test_loader_threads_change_nothing(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    write_spatial_run(other, run.parent / "photos")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("workers: 0", "workers: 2"))
    encoded(run, tmp_path / "none")
    assert encode.main([*keys(run, tmp_path / "two")[1:], f"run={other}"]) == 0
    for path in (tmp_path / "none").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.slow
def test_accelerate_launch_writes_the_same(run: Path, tmp_path: Path) -> None:
    encoded(run, tmp_path / "one")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", "0", "-m", "vae_dist.encode"]
    done = subprocess.run(
        [sys.executable, *command, *keys(run, tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stdout
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
