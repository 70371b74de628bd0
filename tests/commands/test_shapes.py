"""Images of every kind of shape through train, resume, evaluate, reconstruct and sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.distributed import run_ranks
from tests.support.training import losses, rows, same_weights
from vae_dist import evaluate, pack, reconstruct, sample
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
BUCKETS = (
    "data.resolution={area: 256, multiple: 4, max_aspect: 2.0}",
    "data.slots=4",
    "optimizer.schedule=constant",
)


def picture(number: int, shape: tuple[int, int]) -> np.ndarray:
    """Smooth, float in [0, 1], (3, H, W), different for each number."""
    height, width = shape
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(3 * x * (number % 5 + c) + y * (number % 7)) for c in range(3)]
    return np.stack(waves) / 2 + 0.5


def save(kind: str, number: int, path: Path) -> None:
    """photos: of several aspects; faces: of CelebA's shape; sensors, floats: of two channels."""
    if kind in ("photos", "faces"):
        shape = ASPECTS[number % len(ASPECTS)] if kind == "photos" else (218, 178)
        pixels = (picture(number, shape) * 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(path.with_suffix(".png" if kind == "photos" else ".jpg"))
    elif kind == "sensors":
        np.save(path, (picture(number, (37, 53))[:2] * 65535).astype(np.uint16))
    else:
        np.save(path, (picture(number, (11, 13))[:2] * 2 - 1).astype(np.float32))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a kind of image -> folder of its shards, packed once, byte for byte."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            source, out = (tmp_path_factory.mktemp(kind) / name for name in ("source", "packed"))
            source.mkdir()
            count = 9 if kind == "faces" else COUNT
            for number in range(count):
                save(kind, number, source / f"{number:03d}.npy")
            options = (f"source={source}", f"out={out}", "validation=0.2", "workers=1")
            assert pack.main([*options]) == 0
            summary = json.loads((out / "pack.json").read_text())["splits"]
            assert sum(split["kept_byte_for_byte"] for split in summary.values()) == count
            made[kind] = out
        return made[kind]

    return get


def run_train(config: str, run: Path, data: Path, *overrides: str, world: int = 1) -> list[int]:
    shards = (f"data.train={data}/train", f"data.validation={data}/validation")
    arguments = [f"config={config}", f"run={run}", *shards, *SMALL, *overrides]
    return run_ranks(world, train, arguments, timeout_s=200)


CASES = [
    ("photos_buckets", "photos", BUCKETS, (16, 16)),
    ("celeba_native", "faces", ("training.batch_size=2", "training.steps=3"), (218, 178)),
    ("science16", "sensors", (), (37, 53)),
    ("science16", "floats", ("data.bits=32", "data.dequantize=true"), (11, 13)),
    (
        "photos_buckets",
        "photos",
        ("data.resolution=native", "data.slots=8", "data.crop=center"),
        None,
    ),
]


@pytest.mark.parametrize(("config", "kind", "overrides", "shape"), CASES)
def test_a_shape_through_all_commands(
    packed: Callable[[str], Path],
    tmp_path: Path,
    config: str,
    kind: str,
    overrides: tuple[str, ...],
    shape: tuple[int, int] | None,
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
    validation = load_index(f"{data}/validation", key="k", create=False)
    assert figures["num_images"] == validation.num_samples
    out = tmp_path / "r.png"
    assert reconstruct.main([f"run={run}", "device=cpu", "num_images=6", f"out={out}"]) == 0
    Image.open(out).load()
    for resolution, size in (("trained", shape), ("[24, 40]", (24, 40))):
        folder = tmp_path / f"samples {resolution}"
        options = (f"run={run}", "device=cpu", "num_images=2", f"out={folder}")
        assert sample.main([*options, f"resolution={resolution}"]) == 0
        if config == "science16":  # two channels, which no PNG holds
            written = np.load(folder / "000000.npy").shape[1:]
        else:
            written = Image.open(folder / "000000.png").size[::-1]
        assert size in (None, written)


@pytest.mark.parametrize("world", [1, 2])
def test_buckets_do_not_depend_on_ranks_microbatches_or_interruptions(
    packed: Callable[[str], Path], tmp_path: Path, world: int
) -> None:
    """Bit for bit where nothing but the interruption differs."""
    data, whole, parts = packed("photos"), tmp_path / "whole", tmp_path / "parts"
    assert run_train("photos_buckets", whole, data, *BUCKETS) == [0]
    keys = (*BUCKETS, "training.microbatch_size=2") if world == 2 else BUCKETS
    first = (*keys, "training.steps=3")
    assert run_train("photos_buckets", parts, data, *first, world=world) == [0] * world
    assert run_train("photos_buckets", parts, data, *keys) == [0]
    if world == 1:
        assert same_weights(whole, parts, 6)
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-4, atol=0)
    evaluated = [rows(run)[6]["eval/bits_per_dim"] for run in (parts, whole)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)


@pytest.mark.parametrize(
    ("config", "kind", "overrides", "fragments"),
    [
        (
            "photos_buckets",
            "photos",
            ("data.resolution=native", "data.slots=4", "data.crop=center"),
            ("share a size", "data.slots=training.batch_size"),
        ),
        ("science16", "sensors", ("data.bits=8",), ("data.bits=8", "uint16")),
    ],
)
def test_images_that_do_not_fit_are_refused_before_a_plan(
    packed: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    config: str,
    kind: str,
    overrides: tuple[str, ...],
    fragments: tuple[str, ...],
) -> None:
    for dry_run in ("true", "false"):
        keys = (*overrides, f"dry_run={dry_run}")
        assert run_train(config, tmp_path / "run", packed(kind), *keys) == [2]
        out, said = capfd.readouterr()
        assert all(fragment in " ".join(said.split()) for fragment in fragments)
        assert "steps 6" not in out
