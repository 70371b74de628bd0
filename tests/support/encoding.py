"""What tests of `encode` and `decode` share: a small run on photos, and the shards made of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import webdataset as wds
from PIL import Image

from tests.support.latent_data import write_photos, write_spatial_run
from vae_dist import encode

COUNT = 23
DAMAGED = (4, 11)
SMALL = ("shard_mb=0.02", "batch_size=3", "max_skipped_fraction=0.2", "device=cpu", "threads=1")


def photo_run(work: Path) -> Path:
    """A spatial model, and beside it `photos`: 23 samples of three sizes, two of them damaged."""
    write_photos(work / "photos", COUNT, damaged=DAMAGED)
    return write_spatial_run(work / "run", work / "photos")


def keys(run: Path, out: Path, *more: str) -> list[str]:
    return [f"run={run}", f"data={run.parent}/photos", f"out={out}", *SMALL, *more]


def encoded(run: Path, out: Path, *more: str) -> dict[str, Any]:
    assert encode.main(keys(run, out, *more)) == 0
    summary: dict[str, Any] = json.loads((out / "encode.json").read_text())
    return summary


def samples_of(out: Path) -> list[dict[str, Any]]:
    """As a plain webdataset user reads them."""
    shards = sorted(str(path) for path in out.glob("*.tar"))
    return list(wds.WebDataset(shards, shardshuffle=False))


def tensors_of(out: Path) -> list[dict[str, torch.Tensor]]:
    return [safetensors.torch.load(s["latent.safetensors"]) for s in samples_of(out)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def source_image(photos: Path, number: int) -> torch.Tensor:
    """The image of a sample, uint8 (1, C, H, W), read by webdataset and Pillow."""
    shards = sorted(str(path) for path in photos.glob("*.tar"))
    sample = list(wds.WebDataset(shards, shardshuffle=False))[number]
    pixels = np.array(Image.open(io.BytesIO(sample["png"])))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
