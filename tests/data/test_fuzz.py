"""Properties that hold for every shape of data and for any damaged bytes."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.conftest import identities, marked_png
from tests.data.test_loader import InterleavedPool
from vae_dist.config.errors import ConfigError
from vae_dist.data import loader
from vae_dist.data.buckets import make_buckets
from vae_dist.data.decode import decode_image
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.indexing import index_shard, write_sidecar
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import LoadedSample, SampleReader, single_sample
from vae_dist.data.tar import DamagedSampleError, ShardError, files_of_tar
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import write_shards

MARKED = ImageSettings(channels=1, size=(1, 3), resize=False, max_pixels=100)
COUNT = 12


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 24),
    window=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 300),
)
@settings(max_examples=150, deadline=None)
def test_order_of_any_shape(
    lengths: list[int], lanes: int, window: int, seed: int, start: int
) -> None:
    order = Order(lengths, lanes=lanes, window=window, seed=seed)
    total = sum(lengths)
    epoch = start % 3
    numbers = range(epoch * total, (epoch + 1) * total)
    got = [order.sample_at(g) for g in numbers]
    assert {e for e, _, _ in got} == {epoch}
    counts = Counter((shard, index) for _, shard, index in got)
    assert len(counts) == total and set(counts.values()) == {1}
    assert all(0 <= index < lengths[shard] for shard, index in counts)
    # From any row on, the windows of a lane follow each other without gap and without overlap.
    lane, row = start % lanes, start
    for _ in range(3):
        found = order.window_at(lane, row)
        assert found.first_row <= row < found.end_row and len(found.order) <= window
        row = found.end_row


class Memory(SampleReader):
    """Samples that are their own place, some lost with buckets, each of a shape of its own."""

    def read_many(self, parts: Any) -> Any:
        return [
            [
                memoryview(bytes([shard, i // 256, i % 256]))
                for shard, start, stop in runs
                for i in range(start, stop)
            ]
            for runs in parts
        ]

    def prepare(
        self, data: Any, shard: int, index: int, *, size: Any = None, out: Any = None
    ) -> Any:
        if self.settings.buckets and is_lost(shard, index):
            raise DamagedSampleError("lost")
        marks = np.frombuffer(data, np.uint8)[:, None, None]
        if self.settings.buckets:
            return np.broadcast_to(marks, (3, *size))
        return marks.reshape(1, 1, 3)

    def load(self, sample: Any, shard: int, index: int, *, epoch: int) -> LoadedSample:
        return LoadedSample(sample, shard)

    def size_or_none(self, data: Any, shard: int, index: int) -> tuple[int, int] | None:
        place = shard * 31 + index * 7
        return None if is_lost(shard, index) else (10 + place % 13, 10 + place % 17)


def is_lost(shard: int, index: int) -> bool:
    return (shard * 31 + index * 7) % 11 == 3


LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)
IN_MEMORY = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "WorkerPool", InterleavedPool)
    monkeypatch.setattr(loader, "SampleReader", Memory)


def batches_of(lengths: list[int], order: Order, images: ImageSettings, **kwargs: Any) -> Any:
    numbers = np.array(lengths, np.int64)
    index = ShardIndex(tuple(map(str, range(len(lengths)))), numbers, numbers)
    batch_size = order.lanes * max(1, order.slot_rows)
    return TrainingStream(index, order, images, batch_size=batch_size, **kwargs)


@given(
    lengths=LENGTHS,
    slots=st.sampled_from([1, 2, 4, 8]),
    per_slot=st.integers(1, 3),
    window=st.integers(1, 20),
    workers=st.integers(0, 5),
    start=st.integers(0, 40),
    data=st.data(),
)
@IN_MEMORY
def test_streams_of_any_shape(
    in_memory: None,
    lengths: list[int],
    slots: int,
    per_slot: int,
    window: int,
    workers: int,
    start: int,
    data: st.DataObject,
) -> None:
    """Step k shows the samples k B, ..., (k + 1) B - 1 of the order, whoever reads them."""
    batch = slots * per_slot
    world = data.draw(st.sampled_from([w for w in (1, 2, 4, 8) if slots % w == 0]))
    order = Order(lengths, lanes=batch, window=window, seed=1)
    got: dict[int, list[tuple[int, int]]] = {}
    for rank in range(world):
        layout = {"rank": rank, "world": world, "workers": workers, "slots": slots}
        steps = {"start_step": start, "stop_step": start + 5}
        for part in batches_of(lengths, order, MARKED, **layout, **steps):
            (group,) = part.groups
            assert group.slots == tuple(range(rank * slots // world, (rank + 1) * slots // world))
            got.setdefault(part.step, []).extend(identities(group.images.numpy()))
    for step in range(start, start + 5):
        want = [order.sample_at(g)[1:] for g in range(step * batch, (step + 1) * batch)]
        assert got[step] == want


@given(
    lengths=LENGTHS,
    slots=st.sampled_from([1, 2, 4, 8]),
    per_slot=st.integers(1, 4),
    slots_of_window=st.integers(1, 5),
    workers=st.integers(0, 5),
    start=st.integers(0, 30),
    data=st.data(),
)
@IN_MEMORY
def test_bucketed_streams_of_any_shape(
    in_memory: None,
    lengths: list[int],
    slots: int,
    per_slot: int,
    slots_of_window: int,
    workers: int,
    start: int,
    data: st.DataObject,
) -> None:
    """A step shows the same, from wherever the stream was begun and however it is shared."""
    if all(is_lost(shard, i) for shard, n in enumerate(lengths) for i in range(n)):
        return  # nothing can replace anything
    world = data.draw(st.sampled_from([w for w in (1, 2, 4, 8) if slots % w == 0]))
    window = per_slot * slots_of_window
    order = Order(lengths, lanes=slots, window=window, seed=1, slot_rows=per_slot)
    buckets = make_buckets(area=64, multiple=2, max_aspect=2.0)
    images = ImageSettings(3, (8, 8), True, 100, buckets=buckets)

    def shown(world: int, workers: int, start: int, stop: int) -> dict[tuple[int, int], Any]:
        found: dict[tuple[int, int], Any] = {}
        for rank in range(world):
            layout = {"rank": rank, "world": world, "workers": workers, "slots": slots}
            steps = {"start_step": start, "stop_step": stop}
            for part in batches_of(lengths, order, images, **layout, **steps):
                for group in part.groups:
                    size = tuple(group.images.shape[2:])
                    assert size in buckets
                    marks = group.images[:, :, 0, 0].reshape(len(group.slots), -1).tolist()
                    for slot, own in zip(group.slots, marks, strict=True):
                        assert (part.step, slot) not in found
                        found[part.step, slot] = (own, size)
        return found

    got = shown(world, workers, start, start + 3)
    from_the_beginning = shown(1, 0, 0, start + 3)
    assert got == {k: v for k, v in from_the_beginning.items() if k[0] >= start}


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
        image = decode_image(suffix, bytes(data[: len(data) - cut]), channels=3, max_pixels=100_000)
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
    suffix: decode_image(suffix, data, channels=3, max_pixels=1000)
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
