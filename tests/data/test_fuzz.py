"""Properties that hold for every shape of data and for any damaged bytes."""

import contextlib
import io
import logging
import random
import resource
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.conftest import MARKED, identities, load, marked_png, written
from tests.support.picture_sources import encoded, npy, tiff
from vae_dist.config.commands import CheckpointCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import decode_own, decode_sample, kind_of, size_of_sample
from vae_dist.data.index import index_shard
from vae_dist.data.reader import SampleReader
from vae_dist.data.tar import DamagedSampleError, ShardError, files_of_tar
from vae_dist.data.transforms import ImageSettings
from vae_dist.inference.latents import from_bytes, to_bytes
from vae_dist.inference.load import load_model

COUNT = 12
EDIT = st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=600))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    samples = ({"png": marked_png(3, i), "cls": b"3"} for i in range(COUNT))
    return written(tmp_path_factory.mktemp("fuzz") / "set", samples)


@pytest.fixture(scope="module")
def whole(index):
    return Path(index.paths[0]).read_bytes()


@given(edits=st.lists(EDIT, max_size=4), keep=st.just(1.0) | st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_damaged_bytes_have_a_named_outcome(index, whole, edits, keep):
    """Whatever happens to a shard after it was indexed: an image is either the one that was packed
    at its place, or it is named as damaged; nothing else is raised."""
    path, data = Path(index.paths[0]), bytearray(whole)
    for place, piece in edits:
        at = int(place * len(data))
        data[at : at + len(piece)] = piece[: len(data) - at]
    path.write_bytes(bytes(data[: int(keep * len(data))]))
    reader = SampleReader(index, MARKED, seed=0)
    for i, sample in enumerate(reader.read(reader.in_order(0, COUNT))):
        with contextlib.suppress(DamagedSampleError):
            # a PNG has checksums
            assert identities(reader.load(sample, 0, i, epoch=0).image) == [(3, i)]
    with contextlib.suppress(ShardError):
        assert len(index_shard(path)) <= COUNT + 1  # a damaged header is an error, not the end


PIXELS = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
PLANES = PIXELS.transpose(2, 0, 1).copy()
PICTURES = {
    "jpg": encoded(PIXELS, "JPEG"),
    "progressive.jpg": encoded(PIXELS, "JPEG", progressive=True),
    "png": encoded(PIXELS),
    "webp": encoded(PIXELS, "WEBP"),
    "npy": npy(PLANES),
    "tif": tiff(PIXELS),
    "tiles.tif": tiff(PIXELS, tile=(16, 16), compression="zlib"),
    "ome.tif": tiff(PIXELS[:, :, 0], ome=True),
    "pages.tif": tiff(PLANES, photometric="minisblack"),
    "big.tif": tiff(PIXELS, bigtiff=True),
}
VALUES = (0, 1, 2**16, 2**24, 2**31 - 1, 2**32 - 1)


def damaged(generator, whole):
    """A few bytes, or numbers of four, or the end are others; mostly where headers are."""
    data = bytearray(whole)
    for _ in range(generator.randint(1, 4)):
        head = len(data) if generator.random() < 0.3 else min(len(data), 512)
        at, kind = generator.randrange(head), generator.random()
        if kind < 0.25:
            data[at : at + 4] = struct.pack("<I", generator.choice(VALUES))
        elif kind < 0.33:
            del data[max(1, at) :]
        else:
            data[at] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)))
    return bytes(data)


def fuzz(name, whole, read, *, count):
    """Read the whole, then damaged ones: each is read, or refused by our own errors."""
    generator, before = random.Random(name), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read(whole)
    for _ in range(count):
        with contextlib.suppress(ConfigError, DamagedSampleError):
            read(damaged(generator, whole))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PICTURES)
def test_damaged_pictures(name, caplog):
    """A size that is read is kept to; what is accepted, others do not refuse."""
    caplog.set_level(logging.CRITICAL)  # tifffile tells of what it cannot read

    def read(data):
        with contextlib.suppress(DamagedSampleError):
            decode_own(name, data, max_pixels=10**5)
        height, width = size_of_sample({name: data}, max_pixels=10**5)
        pixels = decode_sample({name: data}, ImageSettings(3, (0, 0), False, 10**5))
        assert pixels.dtype == np.uint8 and pixels.shape == (3, height, width)
        assert height * width <= 10**5
        if (kind := kind_of(data)) == "npy":
            assert (np.load(io.BytesIO(data), allow_pickle=False) == pixels).all()
        elif kind != "tif":  # of which Pillow refuses whole ones
            Image.open(io.BytesIO(data)).convert("RGB")
        assert kind != "png" or (pixels == PLANES).all()  # it has checksums

    fuzz(name, PICTURES[name], read, count=300)


@pytest.mark.slow
def test_damaged_shards_indexes_latents_and_configs(index, whole, tmp_path, spatial_run):
    (shard := Path(index.paths[0])).write_bytes(whole)
    run = Path(shutil.copytree(spatial_run, tmp_path / "run"))
    manifest = sorted(run.glob("checkpoints/step_*/manifest.json"))[-1]

    def load_shards():
        index = load(shard.parent)
        reader = SampleReader(index, MARKED, seed=0)
        reader.read(reader.in_order(0, index.num_samples))

    def load_run():
        load_model(CheckpointCommand(run=str(run)), device=torch.device("cpu"))

    def list_tar():
        names = [name for name, _, _ in files_of_tar(str(shard))]
        with tarfile.open(shard) as tar:  # it takes a damaged header for the end
            assert [m.name for m in tar.getmembers() if m.isreg()] == names

    for path, read, count in (
        (shard, list_tar, 400),
        (Path(f"{shard}.idx"), load_shards, 100),
        (shard.with_name("_info.json"), load_shards, 100),
        (run / "config.yaml", load_run, 30),
        (manifest, load_run, 30),
        (manifest.with_name("ema.safetensors"), load_run, 30),
    ):

        def write_and_read(data, path=path, read=read):
            path.write_bytes(data)
            read()

        fuzz(path.name, before := path.read_bytes(), write_and_read, count=count)
        path.write_bytes(before)
    latents = to_bytes({"mean": torch.zeros(4, 2, 2)}, (8, 8))
    fuzz("latents", latents, from_bytes, count=300)
