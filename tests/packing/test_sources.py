from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import pickle
import threading
import warnings
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.picture_sources import opened, png, summary, write_tar
from vae_dist.config.errors import ConfigError
from vae_dist.packing.arrays import download_mnist, read_idx
from vae_dist.packing.items import Item, Listing, check_splits, from_paths, numbered

RANDOM = np.random.default_rng(0)


def test_splits_and_categories_are_read_off_the_paths() -> None:
    def read(*paths: str) -> list[tuple[str | None, object]]:
        return [(i.split, i.category) for i in from_paths(Item(path, None, 1) for path in paths)]

    assert read("a.png", "b.png") == [(None, None)] * 2
    assert read("cat/a.png", "dog/x/b.png") == [(None, "cat"), (None, "dog")]
    assert read("faces/a.png", "faces/b.png") == [(None, None)] * 2
    assert read("set/train/cat/a.png", "set/val/dog/b.png") == [
        ("train", "cat"),
        ("validation", "dog"),
    ]
    assert read("train/a.png") == [("train", None)]


def test_names_of_classes_become_numbers_in_alphabetical_order() -> None:
    items = [Item("a", None, 1, None, c) for c in ("dog", "cat", None)]
    got, classes = numbered(Listing(items, []))
    assert [item.category for item in got] == [1, 0, None] and classes == ("cat", "dog")
    with pytest.raises(ConfigError, match="some classes are named and some are numbers"):
        numbered(Listing([*items, Item("b", None, 1, None, 3)], []))


def test_names_that_are_numbers_are_ordered_as_numbers() -> None:
    items = [Item(f"{i}/a.png", None, 1, None, str(i)) for i in range(12)]
    got, classes = numbered(Listing(items, []))
    assert [item.category for item in got] == list(range(12))
    assert classes == tuple(map(str, range(12)))


def test_a_split_between_classes_is_refused() -> None:
    names = ("bus/0.png", "train/0.png", "car/0.png")
    items = from_paths(Item(name, None, 1) for name in names)
    with pytest.raises(ConfigError, match=r"train/0\.png: train\) and 2 to none \(bus/0\.png\)"):
        check_splits(items)
    check_splits(from_paths(Item(f"train/{name}", None, 1) for name in names))


def test_a_folder(tmp_path: Path) -> None:
    for i, name in enumerate(["cat/a.PNG", "cat/.hidden.png", "dog/b.jpeg", "dog/notes.txt"]):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png(i))
    (tmp_path / "in/dog/empty.png").touch()
    listing, files = opened(tmp_path / "in", tmp_path / "work")
    assert summary(listing.items) == {"cat/a.PNG": (None, "cat"), "dog/b.jpeg": (None, "dog")}
    assert files == [("png", png(0)), ("jpeg", png(2))]
    assert listing.refused == [("dog/empty.png", "an empty file")]


EVIL = ["/etc/evil.png", "../evil.png", "a/../../evil.png", "..\\evil.png", "C:/evil.png"]


def test_a_zip_and_its_evil_members(tmp_path: Path) -> None:
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(["cat/a.png", "__MACOSX/cat/._a.png", "dog/b.png", *EVIL]):
            archive.writestr(name, png(i))
        archive.writestr("dog/zero.png", b"")
    listing, files = opened(path, tmp_path / "work")
    assert [item.name for item in listing.items] == ["cat/a.png", "dog/b.png"]
    assert files == [("png", png(0)), ("png", png(2))]
    reasons = dict(listing.refused)
    assert "an absolute path" in reasons["/etc/evil.png"] + reasons["C:/evil.png"]
    assert reasons["a/../../evil.png"] == reasons["../evil.png"] == "a path with .."
    assert reasons["dog/zero.png"] == "an empty file"
    assert len(listing.refused) == len(EVIL) + 1


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_of_every_compression(tmp_path: Path, mode: str) -> None:
    path = tmp_path / f"in.tar{mode[1:].replace(':', '.')}"
    members = {"x/a.png": png(0), "x/a.cls": b"7", "x/b.png": png(1), "../evil.png": png(2)}
    write_tar(path, members, mode, link="x/link.png")
    listing, files = opened(path, tmp_path / "work")
    assert summary(listing.items) == {"x/a.png": (None, 7), "x/b.png": (None, None)}
    assert files == [("png", png(0)), ("png", png(1))]
    assert listing.refused == [("../evil.png", "a path with ..")]
    assert not (tmp_path / "evil.png").exists()


def test_a_zip_that_has_a_name_twice_gives_both_pictures(tmp_path: Path) -> None:
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        for i in range(2):
            archive.writestr("a.png", png(i))
    _, files = opened(path, tmp_path / "work")
    assert files == [("png", png(0)), ("png", png(1))]


def test_a_tar_of_the_folder_it_was_made_in(tmp_path: Path) -> None:
    write_tar(tmp_path / "in.tar", {"./cat/a.png": png(0), "./dog/b.png": png(1)})
    listing, _ = opened(tmp_path / "in.tar", tmp_path / "work")
    assert [item.category for item in listing.items] == ["cat", "dog"]


def corrupt(data: bytes) -> bytes:
    """A gzip file whose deflate stream is wrong: no OSError but zlib.error."""
    return data[:10] + b"\xff" * 8 + data[18:]


def test_a_tar_gz_with_a_damaged_stream_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.tar.gz").write_bytes(corrupt(gzip.compress(b"x" * 5000)))
    with pytest.raises(ConfigError, match=r"in\.tar\.gz: cannot be unpacked"):
        opened(tmp_path / "in.tar.gz", tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "in.zip").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(ConfigError, match=r"in\.zip: no readable zip file"):
        opened(tmp_path / "in.zip", tmp_path)
    (tmp_path / "in.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(ConfigError, match=r"in\.tar: byte 0: damaged tar header"):
        opened(tmp_path / "in.tar", tmp_path)
    (tmp_path / "in.tar.gz").write_bytes(gzip.compress(b"x" * 5000)[:-9])
    with pytest.raises(ConfigError, match=r"in\.tar\.gz: cannot be unpacked"):
        opened(tmp_path / "in.tar.gz", tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere: no such file; give a folder of pictures"):
        opened(tmp_path / "nowhere", tmp_path)


# MNIST


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.tobytes()


def mnist_contents() -> dict[str, bytes]:
    digits = {prefix: RANDOM.integers(0, 256, (n, 4, 3), dtype=np.uint8) for prefix, n in
              (("train", 5), ("t10k", 2))}  # fmt: skip
    files = {f"{prefix}-images-idx3-ubyte": idx(images) for prefix, images in digits.items()}
    for prefix, images in digits.items():
        files[f"{prefix}-labels-idx1-ubyte"] = idx(np.arange(len(images), dtype=np.uint8))
    return files


def test_mnist_idx_files_packed_or_not(tmp_path: Path) -> None:
    files = mnist_contents()
    for name, data in files.items():
        packed = "images" in name
        (tmp_path / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    listing, pictures = opened(tmp_path, tmp_path / "work")
    assert [(i.split, i.category) for i in listing.items] == [
        *(("train", i) for i in range(5)),
        *(("test", i) for i in range(2)),
    ]
    got = np.stack([np.asarray(Image.open(io.BytesIO(data))) for _, data in pictures[:5]])
    assert idx(got) == files["train-images-idx3-ubyte"]


def test_a_cut_idx_file_is_refused(tmp_path: Path) -> None:
    for name, data in mnist_contents().items():
        (tmp_path / name).write_bytes(data[:-1] if "t10k-images" in name else data)
    with pytest.raises(ConfigError, match=r"t10k-images.* 23 bytes of pixels, but its header"):
        opened(tmp_path, tmp_path / "work")


def test_a_damaged_idx_gz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(corrupt(gzip.compress(idx(np.zeros((2, 4, 3), np.uint8)))))
    with pytest.raises(ConfigError, match=r"ubyte\.gz: cannot be read"):
        read_idx(path)


@contextlib.contextmanager
def served(files: dict[str, bytes]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = files.get(self.path)
            self.send_response(404 if data is None else 200)
            if self.path.startswith("/cut/"):
                self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_mnist_is_downloaded_from_the_mirror_that_has_it(tmp_path: Path) -> None:
    files = mnist_contents()
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    served_files = {f"/good/{name}.gz": gzip.compress(data) for name, data in files.items()}
    served_files |= {f"/other/{name}.gz": gzip.compress(b"other") for name in files}
    served_files |= {f"/cut/{name}.gz": gzip.compress(b"cut") for name in files}
    served_files |= {f"/damaged/{name}.gz": corrupt(gzip.compress(bytes(99))) for name in files}
    with served(served_files) as url:
        bad = ("none", "other", "cut", "damaged")
        mirrors = [*(f"{url}/{kind}/" for kind in bad), f"{url}/good/"]
        download_mnist(tmp_path / "mnist", mirrors=mirrors, sha256=sha256)
        with pytest.raises(ConfigError) as refused:
            download_mnist(tmp_path / "again", mirrors=mirrors[:4], sha256=sha256)
    for name, data in files.items():
        assert (tmp_path / "mnist" / name).read_bytes() == data
    assert "404" in str(refused.value) and "its checksum differs" in str(refused.value)
    assert "source=FOLDER" in str(refused.value)


# CIFAR-10


def cifar_batches() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {
        name: (
            RANDOM.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8),
            np.array([i, 9 - i], np.uint8),
        )
        for i, name in enumerate(names)
    }


def write_cifar(folder: Path, batches: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    files = {
        f"{name}.bin": b"".join(bytes([n]) + i.tobytes() for i, n in zip(*batch, strict=True))
        for name, batch in batches.items()
    }
    files["batches.meta.txt"] = "\n".join(f"class{i}" for i in range(10)).encode()
    path = folder / "cifar-10-binary.tar.gz"
    write_tar(path, {f"cifar-10-batches-bin/{name}": data for name, data in files.items()}, "w:gz")
    return path


def test_the_binary_archive_of_cifar(tmp_path: Path) -> None:
    batches = cifar_batches()
    listing, pictures = opened(write_cifar(tmp_path, batches), tmp_path / "work")
    assert listing.classes == tuple(f"class{i}" for i in range(10))
    assert [item.split for item in listing.items] == ["train"] * 10 + ["test"] * 2
    want = [label for _, labels in batches.values() for label in labels.tolist()]
    assert [item.category for item in listing.items] == want
    first = np.asarray(Image.open(io.BytesIO(pictures[0][1]))).transpose(2, 0, 1)
    np.testing.assert_array_equal(first, batches["data_batch_1"][0][0])


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("never",)


@pytest.mark.parametrize("kind", ["archive", "folder"])
def test_the_pickles_of_cifar_are_refused_unread(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even arrays alone are not admitted: a forged dtype turns bytes into object pointers."""
    path, data = tmp_path / "cifar-10-python.tar.gz", pickle.dumps(Evil())
    if kind == "archive":
        write_tar(path, {"cifar-10-batches-py/data_batch_1": data}, "w:gz")
    else:
        path = tmp_path / "cifar-10-batches-py"
        path.mkdir()
        (path / "data_batch_1").write_bytes(data)
    with pytest.raises(ConfigError, match=r"data_batch_1 is a Python pickle.*cifar-10-binary"):
        opened(path, tmp_path / "work")
    assert capsys.readouterr().out == ""
