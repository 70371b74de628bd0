"""Properties that hold for every shape of data and for any damaged bytes."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import identities, marked_png
from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import decode_sample
from vae_dist.data.index import load_index
from vae_dist.data.indexing import index_shard, write_sidecar
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import SampleReader, single_sample
from vae_dist.data.tar import DamagedSampleError, ShardError, files_of_tar
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import write_shards

MARKED = ImageSettings(channels=1, size=(1, 3), resize=False, max_pixels=100)
COUNT = 12


def _one_shard(folder: Path) -> Path:
    samples = ({"__key__": f"{i:04d}", "png": marked_png(3, i), "cls": b"3"} for i in range(COUNT))
    (path,) = write_shards(samples, folder / "set", num_shards=1)
    return path


@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=600)),
        max_size=4,
    ),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
)
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_have_a_named_outcome(edits: list[tuple[float, bytes]], keep: float) -> None:
    """Whatever happens to a shard after it was indexed: an image is either the one that was packed
    at its place, or it is named as damaged; nothing else is raised."""
    with tempfile.TemporaryDirectory() as name:
        path = _one_shard(Path(name))
        index = load_index(str(path), key="data.train", create=False)
        whole = path.read_bytes()
        data = bytearray(whole)
        for place, piece in edits:
            at = int(place * len(data))
            data[at : at + len(piece)] = piece[: len(data) - at]
        path.write_bytes(bytes(data[: int(keep * len(data))]))
        reader = SampleReader(index, MARKED, seed=0)
        damaged = 0
        for i, sample in enumerate(reader.read(0, 0, COUNT)):
            try:
                image, _ = reader.load(sample, 0, i, epoch=0)
            except DamagedSampleError:
                damaged += 1
                continue
            except ShardError as error:
                assert "pixels, but the first one" in str(error)  # another size: data.resolution
                continue
            assert identities(image) == [(3, i)]  # a PNG has checksums
        order = Order(index.lengths, lanes=4, window=4, seed=0)
        try:
            steps = {"start_step": 0, "stop_step": 3}
            for batch in TrainingStream(index, order, MARKED, batch_size=4, **steps):
                assert batch.groups[0].images.shape == (4, 1, 1, 3)
                assert len(batch.skipped) <= 4
        except ShardError as error:
            assert damaged or "pixels, but the first one" in str(error)
        try:
            write_sidecar(path, index_shard(path))  # a damaged header is an error, not the end
            assert load_index(str(path), key="k", create=False).num_samples <= COUNT
        except ConfigError as error:
            assert str(path) in str(error)


@given(st.binary(max_size=4000))
@settings(max_examples=100, deadline=None)
def test_any_bytes_as_a_sample(data: bytes) -> None:
    header = tarfile.TarInfo("a.png")
    header.size = len(data)
    block = header.tobuf(tarfile.USTAR_FORMAT)
    for record in (data, block + data, block + data + bytes(-len(data) % 512)):
        try:
            sample = single_sample(record, "x.tar")
        except DamagedSampleError:
            continue
        assert set(sample) >= {"__key__"}


@pytest.mark.parametrize("size", [b"-0000001000", b"-0000002000"])
def test_a_file_of_less_than_no_bytes_ends_the_reading(tmp_path: Path, size: bytes) -> None:
    """A valid checksum over a size of -512 bytes: what follows it would be the header itself."""
    block = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT))
    block[124 : 124 + len(size)] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (path := tmp_path / "a.tar").write_bytes(bytes(block) + bytes(1024))
    with pytest.raises(DamagedSampleError, match="damaged tar header"):
        single_sample(bytes(block), "a.tar")
    with pytest.raises(ShardError, match="byte 0: damaged tar header"):
        index_shard(str(path))


@given(
    st.sampled_from(["jpg", "png", "webp", "npy", "tif"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=40),
    st.integers(0, 400),
)
@settings(max_examples=150, deadline=None)
def test_damaged_images_are_refused_or_of_an_allowed_shape(
    suffix: str, place: float, piece: bytes, cut: int
) -> None:
    """PNG has checksums, so that touched bytes are refused or change no pixel. Of JPEG that is so
    where libjpeg warns; otherwise, and for WebP and arrays, nothing says that pixels are others."""
    data = bytearray(ENCODED[suffix])
    at = int(place * len(data))
    data[at : at + len(piece)] = piece
    try:
        image = decode_sample(
            {suffix: bytes(data[: len(data) - cut])}, channels=3, max_pixels=100_000
        )
    except DamagedSampleError as error:
        assert str(error)
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and len(image) == 3
    assert image.shape[1] * image.shape[2] <= 100_000
    if suffix == "png":
        assert (image == WHOLE["png"]).all()


def _encoded() -> dict[str, bytes]:
    import tifffile
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    found = {}
    for suffix, kind in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        found[suffix] = file.getvalue()
    file = io.BytesIO()
    np.save(file, pixels.transpose(2, 0, 1))
    found["npy"] = file.getvalue()
    file = io.BytesIO()
    tifffile.imwrite(file, pixels)
    found["tif"] = file.getvalue()
    return found


ENCODED = _encoded()
WHOLE = {
    suffix: decode_sample({suffix: data}, channels=3, max_pixels=1000)
    for suffix, data in ENCODED.items()
}


def test_a_shard_that_is_shorter_than_its_index_loses_its_last_samples(tmp_path: Path) -> None:
    path = _one_shard(tmp_path)
    index = load_index(str(path), key="data.train", create=False)
    with open(path, "r+b") as file:
        file.truncate(int(index.offsets(0)[9]))
    samples = SampleReader(index, MARKED, seed=0).read(0, 0, COUNT)
    assert [bool(sample) for sample in samples] == [True] * 9 + [False] * 3
    order = Order(index.lengths, lanes=4, window=4, seed=0)
    stream = TrainingStream(index, order, MARKED, batch_size=4, start_step=0, stop_step=3)
    skipped = [s for batch in stream for s in batch.skipped]
    assert sorted(s.index for s in skipped) == [9, 10, 11]
    assert all(s.replaced_by for s in skipped)
    shutil.rmtree(path.parent)
    with np.testing.assert_raises_regex(ShardError, "cannot be read .*put it back or repair it"):
        list(TrainingStream(index, order, MARKED, batch_size=4, start_step=0, stop_step=1))


def test_names_that_would_write_elsewhere_are_only_names(tmp_path: Path) -> None:
    """The trainer writes no member anywhere, so a path in a shard is harmless."""
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("../../evil.png")
        member.size = len(marked_png(1, 2))
        tar.addfile(member, io.BytesIO(marked_png(1, 2)))
    assert [name for name, _, _ in files_of_tar(str(path))] == ["../../evil.png"]
    index = load_index(str(path), key="data.train", create=True)
    reader = SampleReader(index, MARKED, seed=0)
    image = reader.load(reader.read(0, 0, 1)[0], 0, 0, epoch=0).image
    assert identities(image) == [(1, 2)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["_info.json", "evil.tar", "evil.tar.idx"]
