"""Images of every kind of shape through pack, train, evaluate, reconstruct and sample."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.distributed import run_ranks
from tests.support.training import losses, rows
from vae_dist import evaluate, pack, reconstruct, sample, train
from vae_dist.data.index import load_index

KINDS = {  # their sizes in turn, how they are stored
    "photos": (((20, 14), (14, 21), (17, 17), (30, 10), (12, 26)), "png"),
    "sensors": (((37, 53),), np.uint16),  # these have two channels
    "floats": (((11, 13),), np.float32),
    "faces": (((218, 178),), "png"),  # as CelebA's
}
SMALL = (
    *("data.workers=0", "wandb.mode=disabled", "runtime.threads=1", "runtime.device=cpu"),
    *("training.precision=no", "training.steps=4", "training.batch_size=8", "evaluation.every=2"),
    *("evaluation.batch_size=5", "checkpoint.every=2", "log.every=1", "log.num_images=2"),
    *("optimizer.warmup_steps=1", "optimizer.lr=1e-3", "optimizer.schedule=constant"),
    *("model.channels=[8, 8]", "model.blocks=1", "model.norm_groups=4", "model.attention=false"),
    "model.latent_channels=2",
)
BUCKETS = ("data.resolution={area: 256, multiple: 4, max_aspect: 2.0}", "data.slots=4")
NATIVE = ("data.resolution=native", "data.crop=center", "data.slots=8")
DEEP = ("model.channels=[4, 4, 4, 4]", "training.steps=2", "training.batch_size=2")


def packed(kind, folder):
    """Folder of shards of a kind of image, byte for byte."""
    source, out = folder / "source", folder / "packed"
    source.mkdir()
    sizes, form = KINDS[kind]
    for number in range(24):
        height, width = sizes[number % len(sizes)]
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        waves = [np.sin(3 * x * (number % 5 + c) + y * (number % 7)) for c in range(3)]
        smooth = np.stack(waves) / 2 + 0.5  # in [0, 1], (3, H, W)
        if form == "png":
            pixels = (smooth * 255).astype(np.uint8).transpose(1, 2, 0)
            Image.fromarray(pixels).save(source / f"{number:03d}.png")
        else:
            values = smooth[:2] * 65535 if form is np.uint16 else smooth[:2] * 2 - 1
            np.save(source / f"{number:03d}.npy", values.astype(form))
    assert pack.main([f"source={source}", f"out={out}", "validation=0.2", "workers=1"]) == 0
    assert json.loads((out / "pack.json").read_text())["facts"]["kept byte for byte"] == 24
    return out


@pytest.mark.parametrize(
    ("config", "kind", "overrides", "shape"),
    [
        ("photos_buckets", "photos", BUCKETS, (16, 16)),
        ("science16", "sensors", (), (37, 53)),
        ("science16", "floats", ("data.bits=32", "data.dequantize=true"), (11, 13)),
        ("photos_buckets", "photos", NATIVE, None),
        ("celeba_native", "faces", DEEP, (218, 178)),
    ],
)
def test_a_shape_through_all_commands(tmp_path, config, kind, overrides, shape):
    run, data = tmp_path / "run", packed(kind, tmp_path)
    shards = (f"data.train={data}/train", f"data.validation={data}/validation")
    keys = [f"config={config}", f"run={run}", *shards, *SMALL, *overrides]
    assert run_ranks(1, train.main, keys) == [0]
    found, statistics = losses(run), json.loads((run / "latents.json").read_text())
    assert torch.isfinite(found).all() and found[-1] < found[0]
    last = rows(run)[len(found)]
    assert ("eval/bits_per_dim" in last) == ("train/bits_per_dim" in last) == (kind != "floats")
    assert evaluate.main([f"run={run}", "device=cpu", "batch_size=3"]) == 0
    figures = json.loads((run / "results.json").read_text())["figures"]
    assert figures["neg_elbo_nats"] == pytest.approx(last["eval/neg_elbo_nats"], rel=1e-5)
    validation = load_index(f"{data}/validation", key="k", create=False)
    assert figures["num_images"] == statistics["num_images"] == validation.num_samples
    keys = [f"run={run}", "device=cpu"]
    assert reconstruct.main([*keys, "num_images=6", f"out={tmp_path / 'r.png'}"]) == 0
    Image.open(tmp_path / "r.png").load()
    for resolution, size in (("trained", shape), ("[24, 40]", (24, 40))):
        out = tmp_path / f"samples {resolution}"
        assert sample.main([*keys, "num_images=1", f"out={out}", f"resolution={resolution}"]) == 0
        if config == "science16":  # two channels, which no PNG holds
            written = np.load(out / "000000.npy").shape[1:]
        else:
            written = Image.open(out / "000000.png").size[::-1]
        assert size in (None, written)
