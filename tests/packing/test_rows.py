"""Data sets that come as rows of a file: idx, CIFAR-10, parquet, and those of the hub."""

import gzip

import huggingface_hub
import numpy as np
import pyarrow
from pyarrow import parquet

from tests.support.picture_sources import decoded, opened, png, refused, write

RANDOM = np.random.default_rng(0)


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.tobytes()


def test_mnist_idx_files_packed_or_not(tmp_path):
    images = RANDOM.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    labels, of_images = "t10k-labels-idx1-ubyte", "t10k-images-idx3-ubyte"
    files = {
        "train-images-idx3-ubyte.gz": gzip.compress(idx(images)),
        "train-labels-idx1-ubyte": idx(np.arange(5, dtype=np.uint8)),
        of_images: idx(images[:2]),
        labels: idx(np.arange(2, dtype=np.uint8)),
    }
    listing, pictures = opened(write(tmp_path / "in", files), tmp_path / "work")
    want = [(f"{s} {i}", s, i) for s, count in (("train", 5), ("test", 2)) for i in range(count)]
    assert [(i.name, i.split, i.category) for i in listing.items] == want
    np.testing.assert_array_equal([decoded(p) for p in pictures], [*images, *images[:2]])
    assert not listing.left_out
    for k, (name, data, message) in enumerate(
        (
            (of_images, files[of_images][:-1], "23 bytes of pixels, but its header"),
            (of_images, files[of_images][:4] + b"\xff" * 12, "but its header"),
            (of_images, b"PNG" + files[of_images], "is no idx file of unsigned bytes"),
            (labels, idx(np.zeros(3, np.uint8)), "do not belong together"),
            ("train-labels-idx1-ubyte", files[labels], "do not belong together, or one is missing"),
        )
    ):
        damaged = write(tmp_path / f"{k}", {**files, name: data})
        refused(damaged, tmp_path / "work", message)


def test_the_binary_archive_of_cifar(tmp_path):
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    images = RANDOM.integers(0, 256, (6, 2, 3, 32, 32), dtype=np.uint8)
    files = {
        f"c/{name}.bin": bytes([i]) + batch[0].tobytes() + bytes([9 - i]) + batch[1].tobytes()
        for i, (name, batch) in enumerate(zip(names, images, strict=True))
    }
    files["c/batches.meta.txt"] = "\n".join(f"class{i}" for i in range(10)).encode()
    archive = write(tmp_path / "cifar-10-binary.tar.gz", files, "w:gz")
    for source in (archive, write(tmp_path / "in", files)):
        listing, pictures = opened(source, tmp_path / "work")
        assert listing.classes == tuple(f"class{i}" for i in range(10))
        assert [i.split for i in listing.items] == ["train"] * 10 + ["test"] * 2
        want = [label for i in range(6) for label in (i, 9 - i)]
        assert [i.category for i in listing.items] == want
        found = np.stack([decoded(p) for p in pictures])
        np.testing.assert_array_equal(found, np.concatenate(images).transpose(0, 2, 3, 1))
    torn = write(tmp_path / "torn", {"test_batch.bin": bytes(3000)})
    refused(torn, tmp_path / "work", "is cut off")


def write_parquet(path, labels, *, column="image", images=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = images or [{"bytes": png(i), "path": None} for i in range(len(labels))]
    table = pyarrow.table({column: images, "label": labels})
    features = b'{"info": {"features": {"label": {"names": ["cat", "dog"]}}}}'
    table = table.replace_schema_metadata({b"huggingface": features})
    parquet.write_table(table, path, **options)
    return path


def test_parquet_in_folders_of_splits_lists_and_rows_without_pictures(tmp_path):
    for split in ("train", "validation", "test"):
        images = [png(), None, b""] if split == "test" else None
        labels = [0] * (3 if images else 1)
        write_parquet(tmp_path / f"in/default/{split}/0000.parquet", labels, images=images)
    write_parquet(tmp_path / "in/list.parquet", [0], column="url")
    listing, _ = opened(tmp_path / "in", tmp_path / "work")
    assert sorted(str(i.split) for i in listing.items) == ["test", "train", "validation"]
    assert listing.left_out == ["list.parquet: no column of pictures among url, label"]
    assert listing.lost == [f"0000.parquet row {k}: no bytes of a picture" for k in (1, 2)]
    images = [bytes(25 << 20) + bytes([i]) for i in range(3)]
    path = write_parquet(tmp_path / "a.parquet", [0] * 3, images=images, compression="zstd")
    assert path.stat().st_size < 1 << 17
    refused(path, tmp_path / "work", "claim to be larger than it can hold")


def test_columns_and_labels_of_parquet(tmp_path):
    path = write_parquet(tmp_path / "pixels.parquet", [1], column="pixels")
    assert opened(path, tmp_path / "a", image_column="pixels")[1] == [png()]
    refused(path, tmp_path / "a", r"label_column=x: .* columns pixels, label", label_column="x")
    for labels, want in (
        ([True, False], ["1", "0"]),
        ([3.0, float("nan")], ["3", "None"]),
        (["cat", "dog"], ["'cat'", "'dog'"]),
    ):
        path = write_parquet(tmp_path / "a.parquet", labels)
        found = [item.category for item in opened(path, tmp_path / "a")[0].items]
        assert list(map(repr, found)) == want
    for labels in ([0.5], [[1]], [b"x"]):
        path = write_parquet(tmp_path / "a.parquet", labels)
        refused(path, tmp_path / "b", "row 0: the label .* is neither an integer nor a name")
        assert not list((tmp_path / "b").iterdir())


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """The files of a folder stand for the data set o/r."""

    def list_repo_files(self, name, *, revision, repo_type):
        if name != "o/r":
            raise OSError("404: no such data set")
        return [str(p.relative_to(tmp_path / "hub")) for p in (tmp_path / "hub").rglob("*.*")]

    def hf_hub_download(self, name, file, *, repo_type, revision):
        return str(tmp_path / "hub" / file)

    for method in (list_repo_files, hf_hub_download):
        monkeypatch.setattr(huggingface_hub.HfApi, method.__name__, method)
    for split, count in (("train", 2), ("test", 1)):
        path = tmp_path / f"hub/plain/{split}-00000-of-00001.parquet"
        write_parquet(path, [1] * count, column="img")
    for spec in ("hf://datasets/o/r", "hf://datasets/o/r@main/plain"):  # then from the copies
        listing, files = opened(spec, tmp_path / "work")
        found = [(i.split, i.category) for i in listing.items]
        assert found == [("test", 1), ("train", 1), ("train", 1)]
        assert listing.classes == ("cat", "dog") and files == [png(0), png(0), png(1)]
    write_parquet(tmp_path / "hub/other/train-0.parquet", [1])
    for spec, message in (
        ("hf://datasets/o/r", r"several sets: other, plain; name one: hf://.*/FOLDER"),
        ("hf://datasets/o/none", r"the hub does not give it \(.*404"),
        ("hf://o/r", r"write it like hf://datasets/OWNER/NAME"),
        ("hf://datasets/o/r/none", "no parquet file is there; download"),
    ):
        refused(spec, tmp_path / "work", message)
