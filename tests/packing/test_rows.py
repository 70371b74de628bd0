"""Data sets that come as rows of a file: idx, CIFAR-10, parquet, and those of the hub."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.picture_sources import listed, opened, png, write_files, write_tar
from vae_dist.config.errors import ConfigError

RANDOM = np.random.default_rng(0)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


# MNIST


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.tobytes()


def mnist() -> dict[str, bytes]:
    files = {}
    for prefix, count in (("train", 5), ("t10k", 2)):
        images = RANDOM.integers(0, 256, (count, 4, 3), dtype=np.uint8)
        files[f"{prefix}-images-idx3-ubyte"] = idx(images)
        files[f"{prefix}-labels-idx1-ubyte"] = idx(np.arange(count, dtype=np.uint8))
    return files


def test_mnist_idx_files_packed_or_not(tmp_path: Path) -> None:
    files = mnist()
    packed = {n + ".gz" * ("images" in n): gzip.compress(d) if "images" in n else d
              for n, d in files.items()}  # fmt: skip
    listing, pictures = opened(write_files(tmp_path / "in", packed), tmp_path / "work")
    assert [(i.name, i.split, i.category) for i in listing.items] == [
        *((f"train {i}", "train", i) for i in range(5)),
        *((f"test {i}", "test", i) for i in range(2)),
    ]
    assert idx(np.stack([pixels(p) for p in pictures[:5]])) == files["train-images-idx3-ubyte"]
    assert not listing.left_out


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("t10k-images-idx3-ubyte", lambda d: d[:-1], "23 bytes of pixels, but its header"),
        ("t10k-images-idx3-ubyte", lambda d: b"PNG" + d, "is no idx file of unsigned bytes"),
        ("t10k-labels-idx1-ubyte", lambda d: idx(np.zeros(3, np.uint8)), "do not belong together"),
        ("t10k-labels-idx1-ubyte", None, r"labels-idx1-ubyte\[\.gz\] is missing"),
    ],
)
def test_damaged_idx_files_are_refused(
    tmp_path: Path, name: str, change: Any, message: str
) -> None:
    files = mnist()
    data = files.pop(name)
    if change:
        files[name] = change(data)
    with pytest.raises(ConfigError, match=message):
        listed(write_files(tmp_path / "in", files), tmp_path / "work")


# CIFAR-10


def cifar() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {
        name: (RANDOM.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8), [i, 9 - i])
        for i, name in enumerate(names)
    }


def test_the_binary_archive_of_cifar(tmp_path: Path) -> None:
    batches = cifar()
    files = {
        f"c/{name}.bin": b"".join(bytes([n]) + i.tobytes() for i, n in zip(*batch, strict=True))
        for name, batch in batches.items()
    }
    files["c/batches.meta.txt"] = "\n".join(f"class{i}" for i in range(10)).encode()
    archive = write_tar(tmp_path / "cifar-10-binary.tar.gz", files, "w:gz")
    for source in (archive, write_files(tmp_path / "in", files)):
        listing, pictures = opened(source, tmp_path / "work")
        assert listing.classes == tuple(f"class{i}" for i in range(10))
        assert [i.split for i in listing.items] == ["train"] * 10 + ["test"] * 2
        want = [label for _, labels in batches.values() for label in labels]
        assert [i.category for i in listing.items] == want
        images = np.concatenate([images for images, _ in batches.values()])
        np.testing.assert_array_equal(
            np.stack([pixels(p) for p in pictures]), images.transpose(0, 2, 3, 1)
        )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data_batch_1.bin": bytes(3073)}, "batches of CIFAR-10 are missing"),
        ({"test_batch.bin": bytes(3000)}, "3000 bytes are no multiple of 3073"),
    ],
)
def test_parts_of_cifar_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listed(write_files(tmp_path / "in", files), tmp_path / "work")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("never",)


@pytest.mark.parametrize("kind", ["archive", "folder"])
def test_the_pickles_of_cifar_are_refused_unread(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even arrays alone are not admitted: a forged dtype turns bytes into object pointers."""
    files = {"cifar-10-batches-py/data_batch_1": pickle.dumps(Evil())}
    source = (
        write_tar(tmp_path / "cifar-10-python.tar.gz", files, "w:gz")
        if kind == "archive"
        else write_files(tmp_path / "in", files)
    )
    with pytest.raises(ConfigError, match=r"data_batch_1 is a Python pickle.*cifar-10-binary"):
        listed(source, tmp_path / "work")
    assert capsys.readouterr().out == ""


# parquet


def write_parquet(
    path: Path, labels: list[Any], *, column: str = "image", metadata: bytes = b""
) -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(i), "path": None} for i in range(len(labels))]
    table = pyarrow.table({column: images, "label": labels})
    parquet.write_table(table.replace_schema_metadata({b"huggingface": metadata}), path)
    return path


@pytest.mark.parametrize("column", ["image", "img", "jpg", "pixels"])
def test_parquet_of_the_hub_kind(tmp_path: Path, column: str) -> None:
    features = b'{"info": {"features": {"label": {"names": ["cat", "dog"]}}}}'
    for split, count in (("train", 2), ("test", 1)):
        path = tmp_path / f"in/{split}-00000-of-00001.parquet"
        write_parquet(path, [1] * count, column=column, metadata=features)
    keys = {"image_column": "pixels"} if column == "pixels" else {}
    for _ in range(2):  # the second time from the copy
        listing, files = opened(tmp_path / "in", tmp_path / "work", **keys)
        assert [(i.split, i.category) for i in listing.items] == [
            ("test", 1), ("train", 1), ("train", 1)
        ]  # fmt: skip
        assert listing.classes == ("cat", "dog") and files == [png(0), png(0), png(1)]
    with pytest.raises(ConfigError, match=f"label_column=x: .* has the columns {column}, label"):
        listed(tmp_path / "in", tmp_path / "work", label_column="x", **keys)


def test_parquet_in_folders_of_splits_and_lists_without_pictures(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write_parquet(tmp_path / f"in/default/{split}/0000.parquet", [0])
    write_parquet(tmp_path / "in/list.parquet", [0], column="url")
    listing = listed(tmp_path / "in", tmp_path / "work")
    assert sorted(str(i.split) for i in listing.items) == ["test", "train", "validation"]
    assert listing.left_out == [("list.parquet", "no column of pictures among url, label")]


def test_rows_without_a_picture_are_lost(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"image": pyarrow.array([png(), None, b""], pyarrow.binary())})
    parquet.write_table(table, tmp_path / "a.parquet")
    listing, files = opened(tmp_path / "a.parquet", tmp_path / "work")
    assert files == [png()]
    assert [name for name, _ in listing.lost] == ["a.parquet row 1", "a.parquet row 2"]


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        ([True, False], [1, 0]),
        ([3.0, float("nan")], [3, None]),
        ([2, None], [2, None]),
        (["cat", "dog"], ["cat", "dog"]),
    ],
)
def test_labels_of_parquet(tmp_path: Path, labels: list[object], want: list[object]) -> None:
    listing = listed(write_parquet(tmp_path / "a.parquet", labels), tmp_path / "work")
    got = [item.category for item in listing.items]
    assert got == want and not any(isinstance(category, bool | float) for category in got)


@pytest.mark.parametrize("label", [0.5, [1], b"x"])
def test_labels_of_parquet_that_are_no_class_are_named(tmp_path: Path, label: object) -> None:
    path = write_parquet(tmp_path / "a.parquet", [label])
    with pytest.raises(ConfigError, match=r"a\.parquet: row 0: the label .* is neither an integer"):
        listed(path, tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


# the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files of a folder as the data set o/r of a hub on the loopback."""
    root, commit = tmp_path / "hub", "b" * 40
    root.mkdir()

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def answer(self, code: int, body: bytes, **headers: str) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.*")}
            path = self.path.split("?")[0]
            if re.match(r"/api/datasets/o/r/tree/main", path):
                tree = [{"type": "file", "path": n, "size": len(d), "oid": "a" * 40}
                        for n, d in files.items()]  # fmt: skip
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            found = re.fullmatch(r"/datasets/o/r/resolve/[^/]+/(.*)", path)
            if not found or found[1] not in files:
                return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
            tag = f'"{found[1]}"'.replace("/", "-")
            return self.answer(200, files[found[1]], ETag=tag, X_Repo_Commit=commit)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    from huggingface_hub import constants

    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # other tests set it before the import
    yield root
    server.shutdown()
    server.server_close()


def test_a_data_set_of_the_hub(hub: Path, tmp_path: Path) -> None:
    for split, count in (("train", 2), ("test", 1)):
        write_parquet(hub / f"plain/{split}-00000-of-00001.parquet", [1] * count)
    for spec in ("hf://datasets/o/r", "hf://datasets/o/r@main/plain"):
        listing, files = opened(spec, tmp_path / "work")
        assert [i.split for i in listing.items] == ["test", "train", "train"]
        assert files == [png(0), png(0), png(1)]
    write_parquet(hub / "other/train-0.parquet", [1])
    with pytest.raises(ConfigError, match=r"several sets: other, plain; name one: hf://.*/FOLDER"):
        listed("hf://datasets/o/r", tmp_path / "work")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf://datasets/o/none", "the hub does not give it"),
        ("hf://o/r", r"write it like hf://datasets/OWNER/NAME"),
        ("hf://datasets/o/r/none", "no parquet file is there; download"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_the_hub_has_not_is_named(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listed(spec, tmp_path / "work")
