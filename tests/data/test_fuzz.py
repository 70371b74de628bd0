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
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.conftest import MARKED, identities, load, marked_png, written
from tests.support.picture_sources import encoded, npy
from vae_dist.config.commands import CheckpointCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import decode_own, decode_sample, kind_of, size_of_sample
from vae_dist.data.index import index_shard
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import SampleReader
from vae_dist.data.tar import DamagedSampleError, ShardError, files_of_tar
from vae_dist.data.transforms import ImageSettings
from vae_dist.inference.latents import from_bytes, to_bytes
from vae_dist.inference.load import load_model

COUNT = 12


def one_shard(folder):
    return written(folder / "set", ({"png": marked_png(3, i), "cls": b"3"} for i in range(COUNT)))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return one_shard(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def whole(index):
    return Path(index.paths[0]).read_bytes()


EDIT = st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=600))


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
    reader, damaged = SampleReader(index, MARKED, seed=0), 0
    for i, sample in enumerate(reader.read(reader.in_order(0, COUNT))):
        try:
            image = reader.load(sample, 0, i, epoch=0).image
        except DamagedSampleError:
            damaged += 1
            continue
        except ShardError as error:
            assert "pixels, but the first one" in str(error)  # another size: data.resolution
            continue
        assert identities(image) == [(3, i)]  # a PNG has checksums
    order = Order(index.lengths, lanes=4, window=4, seed=0)
    try:
        keys = {"batch_size": 4, "start_step": 0, "stop_step": 3}
        for batch in TrainingStream(index, order, MARKED, **keys):
            assert batch.groups[0].images.shape == (4, 1, 1, 3) and len(batch.skipped) <= 4
    except ShardError as error:
        assert damaged or "pixels, but the first one" in str(error)
    try:
        assert len(index_shard(path)) <= COUNT + 1  # a damaged header is an error, not the end
    except ConfigError as error:
        assert str(path) in str(error)


def pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    planes = pixels.transpose(2, 0, 1).copy()
    found = {
        "jpg": encoded(pixels, "JPEG"),
        "progressive.jpg": encoded(pixels, "JPEG", progressive=True),
        "png": encoded(pixels),
        "webp": encoded(pixels, "WEBP"),
        "npy": npy(planes),
    }
    for name, array, options in (
        ("tif", pixels, {}),
        ("tiles.tif", pixels, {"tile": (16, 16), "compression": "zlib"}),
        ("ome.tif", pixels[:, :, 0], {"ome": True}),
        ("pages.tif", planes, {"photometric": "minisblack"}),
        ("big.tif", pixels, {"bigtiff": True}),
    ):
        tifffile.imwrite(file := io.BytesIO(), array, **options)
        found[name] = file.getvalue()
    return found


def read_picture(name, data):
    """A size that is read is kept to; what is accepted, others do not refuse."""
    sample = {name: data}
    try:
        size = size_of_sample(sample, max_pixels=10**5)
        pixels = decode_sample(sample, ImageSettings(3, (0, 0), False, 10**5))
    except DamagedSampleError as error:
        assert str(error)
        return None
    assert pixels.shape == (3, *size) and pixels.dtype == np.uint8 and size[0] * size[1] <= 10**5
    if kind_of(data) == "npy":
        assert (np.load(io.BytesIO(data), allow_pickle=False) == pixels).all()
    elif kind_of(data) != "tif":  # of which Pillow refuses whole ones
        Image.open(io.BytesIO(data)).convert("RGB")
    if kind_of(data) == "png":  # which has checksums
        whole = decode_own("png", PICTURES["png"], max_pixels=1000)
        assert (pixels == whole).all()
    return pixels


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


PICTURES = pictures()
VALUES = (0, 1, 2**16, 2**24, 2**31 - 1, 2**32 - 1)


def damaged(generator, whole):
    """A few bytes, or numbers of four, or the end are others; mostly where headers are."""
    data = bytearray(whole)
    for _ in range(generator.randint(1, 4)):
        head = len(data) if generator.random() < 0.3 else min(len(data), 512)
        at = generator.randrange(head)
        match generator.randrange(4):
            case 0:
                data[at : at + 4] = struct.pack("<I", generator.choice(VALUES))
            case 1 if generator.random() < 0.3:
                del data[max(1, at) :]
            case _:
                data[at] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)))
    return bytes(data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PICTURES)
def test_damaged_pictures(name, caplog):
    caplog.set_level(logging.CRITICAL)  # tifffile tells of what it cannot read
    generator, before = random.Random(name), peak_megabytes()
    assert read_picture(name, PICTURES[name]) is not None
    for _ in range(300):
        data = damaged(generator, PICTURES[name])
        read_picture(name, data)
        with contextlib.suppress(DamagedSampleError):
            decode_own(name, data, max_pixels=10**5)
    assert peak_megabytes() - before < 300


@pytest.mark.slow
def test_damaged_shards_indexes_latents_and_configs(tmp_path, spatial_run):
    """Whatever their bytes are, each reader reads, or refuses by our own errors."""
    shard, before = Path(one_shard(tmp_path).paths[0]), peak_megabytes()
    info = shard.parent / "_info.json"
    run = Path(shutil.copytree(spatial_run, tmp_path / "run"))
    manifest = sorted(run.glob("checkpoints/step_*/manifest.json"))[-1]
    weights = manifest.with_name("ema.safetensors")
    latents = to_bytes({"mean": torch.zeros(4, 2, 2)}, (8, 8))

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

    readers = [
        (shard, list_tar, 400),
        (Path(f"{shard}.idx"), load_shards, 100),
        (info, load_shards, 100),
        (run / "config.yaml", load_run, 30),
        (manifest, load_run, 30),
        (weights, load_run, 30),
    ]
    for path, read, count in readers:
        generator, whole = random.Random(path.name), path.read_bytes()
        for _ in range(count):
            path.write_bytes(damaged(generator, whole))
            with contextlib.suppress(ConfigError, DamagedSampleError):
                read()
        path.write_bytes(whole)
        read()
    generator = random.Random("latents")
    for _ in range(300):
        with contextlib.suppress(DamagedSampleError):
            from_bytes(damaged(generator, latents))
    assert peak_megabytes() - before < 500
