"""Images of every kind of shape through train, resume, evaluate, reconstruct and sample."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.distributed import run_ranks
from tests.support.training import losses, rows, same_weights
from vae_dist import evaluate, pack, reconstruct, sample
from vae_dist.config.schema import DataConfig
from vae_dist.data.index import load_index
from vae_dist.train import main as train

COUNT = 24
ASPECTS = ((20, 14), (14, 21), (17, 17), (30, 10), (12, 26))
SMALL = (
    "data.workers=0",
    "wandb.mode=disabled",
    "runtime.threads=1",
    "runtime.device=cpu",
    "training.precision=no",
    "training.steps=6",
    "training.batch_size=8",
    "evaluation.every=3",
    "evaluation.batch_size=5",
    "checkpoint.every=3",
    "log.every=1",
    "log.num_images=4",
    "optimizer.warmup_steps=1",
    "optimizer.lr=1e-3",
    "model.channels=[8, 8]",
    "model.blocks=1",
    "model.norm_groups=4",
    "model.attention=false",
    "model.latent_channels=2",
)


def picture(number: int, shape: tuple[int, int]) -> np.ndarray:
    """Smooth, float in [0, 1], (C, H, W), different for each number."""
    height, width = shape
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(3 * x * (number % 5 + c) + y * (number % 7)) for c in range(3)]
    return np.stack(waves) / 2 + 0.5


def photos(folder: Path) -> None:
    for number in range(COUNT):
        pixels = picture(number, ASPECTS[number % len(ASPECTS)])
        image = Image.fromarray((pixels * 255).astype(np.uint8).transpose(1, 2, 0))
        image.save(folder / f"{number:03d}.png")


def faces(folder: Path) -> None:
    """Of the shape of CelebA, 178x218."""
    for number in range(9):
        pixels = picture(number, (218, 178))
        image = Image.fromarray((pixels * 255).astype(np.uint8).transpose(1, 2, 0))
        image.save(folder / f"{number:03d}.jpg")


def sensors(folder: Path) -> None:
    """37x53 with two channels of 16 bits."""
    for number in range(COUNT):
        pixels = picture(number, (37, 53))[:2]
        np.save(folder / f"{number:03d}.npy", (pixels * 65535).astype(np.uint16))


def floats(folder: Path) -> None:
    for number in range(COUNT):
        pixels = picture(number, (11, 13))[:2] * 2 - 1
        np.save(folder / f"{number:03d}.npy", pixels.astype(np.float32))


MAKERS = {"photos": photos, "faces": faces, "sensors": sensors, "floats": floats}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Name of a kind of image -> folder of its shards, packed once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            source, out = (tmp_path_factory.mktemp(kind) / name for name in ("source", "packed"))
            source.mkdir()
            MAKERS[kind](source)
            options = (f"source={source}", f"out={out}", "validation=0.2", "workers=1")
            assert pack.main([*options]) == 0
            summary = json.loads((out / "pack.json").read_text())["splits"]
            kept = sum(split["kept_byte_for_byte"] for split in summary.values())
            assert kept == len(list(source.iterdir()))
            made[kind] = out
        return made[kind]

    yield get


def run_train(config: str, run: Path, data: Path, *overrides: str, world: int = 1) -> list[int]:
    arguments = [
        f"config={config}",
        f"run={run}",
        f"data.train={data}/train",
        f"data.validation={data}/validation",
        *SMALL,
        *overrides,
    ]
    return run_ranks(world, train, arguments, timeout_s=200)


BUCKETS = "data.resolution={area: 256, multiple: 4, max_aspect: 2.0}"
CASES = [
    ("photos_buckets", "photos", (BUCKETS, "data.slots=4"), (16, 16, 3)),
    ("celeba_native", "faces", ("training.batch_size=2", "training.steps=3"), (218, 178, 3)),
    ("science16", "sensors", (), (37, 53, 2)),
    ("science16", "floats", ("data.bits=32", "data.dequantize=true"), (11, 13, 2)),
    ("photos_buckets", "photos", ("data.resolution=native", "data.slots=8", "data.crop=center"), 0),
]


@pytest.mark.parametrize(("config", "kind", "overrides", "shape"), CASES)
def test_a_shape_through_all_commands(
    packed: Any,
    tmp_path: Path,
    config: str,
    kind: str,
    overrides: tuple[str, ...],
    shape: Any,
) -> None:
    run, data = tmp_path / "run", packed(kind)
    assert run_train(config, run, data, *overrides) == [0]
    found = losses(run)
    assert torch.isfinite(found).all() and found[-1] < found[0]
    last = rows(run)[len(found)]
    assert ("eval/bits_per_dim" in last) == ("train/bits_per_dim" in last) == (kind != "floats")
    assert evaluate.main([f"run={run}", "device=cpu", "batch_size=3"]) == 0
    figures = json.loads((run / "results.json").read_text())["figures"]
    assert figures["neg_elbo_nats"] == pytest.approx(last["eval/neg_elbo_nats"], rel=1e-5)
    assert (
        figures["num_images"] == load_index(f"{data}/validation", key="k", create=False).num_samples
    )
    out = tmp_path / "r.png"
    assert reconstruct.main([f"run={run}", "device=cpu", "num_images=6", f"out={out}"]) == 0
    Image.open(out).load()
    for resolution in ("trained", "[24, 40]"):
        folder = tmp_path / f"samples {resolution}"
        options = (f"run={run}", "device=cpu", "num_images=2", f"out={folder}")
        assert sample.main([*options, f"resolution={resolution}"]) == 0
        height, width = (24, 40) if resolution != "trained" else (shape or (0, 0))[:2]
        if config == "science16":  # two channels, which no PNG holds
            size = np.load(folder / "000000.npy").shape[:0:-1]
        else:
            size = Image.open(folder / "000000.png").size
        assert not height or size == (width, height)


@pytest.mark.parametrize("world", [1, 2])
def test_buckets_do_not_depend_on_ranks_microbatches_or_interruptions(
    packed: Any, tmp_path: Path, world: int
) -> None:
    data, options = (
        packed("photos"),
        (BUCKETS, "data.slots=4", "optimizer.schedule=constant"),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_train("photos_buckets", whole, data, *options) == [0]
    microbatch = f"training.microbatch_size={4 // world}"
    first = ("training.steps=3", microbatch)
    assert run_train("photos_buckets", parts, data, *options, *first, world=world) == [0] * world
    assert run_train("photos_buckets", parts, data, *options, microbatch) == [0]
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-4, atol=0)
    evaluated = [rows(run)[6]["eval/bits_per_dim"] for run in (parts, whole)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)


def test_an_interrupted_run_of_buckets_equals_the_uninterrupted_one_bit_for_bit(
    packed: Any, tmp_path: Path
) -> None:
    data, options = packed("photos"), (BUCKETS, "data.slots=4", "optimizer.schedule=constant")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_train("photos_buckets", whole, data, *options) == [0]
    assert run_train("photos_buckets", parts, data, *options, "training.steps=4") == [0]
    assert run_train("photos_buckets", parts, data, *options) == [0]
    assert same_weights(whole, parts, 6)


def test_native_images_of_several_sizes_need_slots_of_one_image(
    packed: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("data.resolution=native", "data.slots=4", "data.crop=center")
    for dry_run in ("true", "false"):
        asked = (*options, f"dry_run={dry_run}")
        assert run_train("photos_buckets", tmp_path / "run", packed("photos"), *asked) == [2]
        out, said = capfd.readouterr()
        assert "share a size" in said and "data.slots=training.batch_size" in said
        assert "steps 6" not in out  # it does not come to a plan


def test_16_bit_files_are_refused_with_the_key_that_reads_them(
    packed: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_train("science16", tmp_path / "run", packed("sensors"), "data.bits=8") == [2]
    said = " ".join(capfd.readouterr().err.split())
    assert "data.bits=8 reads uint8 values" in said and "uint16" in said


def test_a_png_is_not_narrowed_on_its_way(tmp_path: Path) -> None:
    """16-bit grey PNG: pack keeps its bytes, and the loader its levels."""
    from vae_dist.data.reader import SampleReader
    from vae_dist.data.settings import image_settings

    levels = np.arange(16, dtype=np.uint16).reshape(4, 4) + 1000
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(file.getvalue())
    options = (f"source={tmp_path}/in", f"out={tmp_path}/out", "validation=0", "workers=1")
    assert pack.main([*options]) == 0
    index = load_index(f"{tmp_path}/out/train", key="k", create=False)
    settings = image_settings(
        index, DataConfig(channels=1, resolution="native", max_pixels=100, bits=16)
    )
    reader = SampleReader(index, settings, seed=0)
    image = reader.load(reader.read(0, 0, 1)[0], 0, 0, epoch=0).image
    assert (image[0] == levels).all() and image.dtype == np.uint16
