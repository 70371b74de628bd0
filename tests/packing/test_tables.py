from __future__ import annotations

import os
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from tests.support.picture_sources import opened, png, summary
from vae_dist.config.errors import ConfigError
from vae_dist.packing.items import Listing
from vae_dist.packing.tables import ParquetSource


def test_celeba_after_its_lists(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "img_align_celeba.zip", "w") as archive:
        for i in range(1, 5):
            archive.writestr(f"img_align_celeba/{i:06d}.jpg", png(i))
    partition = [f"{i:06d}.jpg {split}" for i, split in ((1, 0), (2, 1), (3, 2))]
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")
    attributes = ["4", "Smiling Young "] + [f"{i:06d}.jpg  1 -1" for i in range(1, 5)]
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(attributes) + "\n")
    for path in (tmp_path, tmp_path / "img_align_celeba.zip"):
        listing, files = opened(path, tmp_path / "work")
        assert [item.split for item in listing.items] == ["train", "validation", "test"]
        assert listing.items[1].extra == {"attributes": {"Smiling": 1, "Young": -1}}
        assert files[0] == ("jpg", png(1))
        assert [name for name, _ in listing.refused] == ["img_align_celeba/000004.jpg"]


def test_labels_from_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.png").write_bytes(png(i))
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label,split,age\n0.png,tabby,train,3\n1.png,siam,val,4\n")
    listing, _ = opened(tmp_path / "in", tmp_path / "work", labels=str(labels))
    assert summary(listing.items) == {"0.png": ("train", "tabby"), "1.png": ("validation", "siam")}
    assert listing.items[0].extra == {"age": "3"}
    assert listing.refused == [("2.png", f"not in labels={labels}")]


@pytest.mark.parametrize(("labels", "want"), [("5,,7", [5, None, 7]), ("b, ,a", ["b", None, "a"])])
def test_an_empty_label_is_none_and_renumbers_nothing(
    tmp_path: Path, labels: str, want: list[object]
) -> None:
    (tmp_path / "in").mkdir()
    lines = ["path,label"]
    for i, label in enumerate(labels.split(",")):
        (tmp_path / f"in/{i}.png").write_bytes(png(i))
        lines.append(f"{i}.png,{label}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    listing, _ = opened(tmp_path / "in", tmp_path, labels=str(tmp_path / "labels.csv"))
    assert [item.category for item in listing.items] == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.png,1", r"0\.png fits bus/0\.png and car/0\.png; name each picture by its path"),
        ("0.png,1\n0.png,2", r"line 3: 0\.png is there twice, and the lines differ"),
    ],
)
def test_rows_that_could_mean_either_are_refused(tmp_path: Path, text: str, message: str) -> None:
    for folder in ("bus", "car"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "0.png").write_bytes(png())
    labels = tmp_path / "labels.csv"
    labels.write_text(f"path,label\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / "in", tmp_path, labels=str(labels))
    labels.write_text("path,label\nbus/0.png,1\nbus/0.png,1\n0.png,2\n")
    listing, _ = opened(tmp_path / "in", tmp_path, labels=str(labels))
    assert summary(listing.items) == {"bus/0.png": (None, 1), "car/0.png": (None, 2)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"hold none of path, file"),
        ("path,label\nx.png\n", "line 2 has another number of columns"),
        ("path,split\n0.png,holdout\n", "line 2: split 'holdout' is unknown"),
        ("path,label\nx.png,1\n", "names none of the 1 pictures"),
    ],
)
def test_wrong_csv_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(png())
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / "in", tmp_path / "work", labels=str(tmp_path / "labels.csv"))


@pytest.mark.parametrize("column", ["image", "img"])
def test_parquet_of_the_hub_kind(tmp_path: Path, column: str) -> None:
    import pyarrow
    from pyarrow import parquet

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = b'{"info": {"features": {"label": {"names": ["cat", "dog"]}}}}'
    schema = pyarrow.schema([(column, kind), ("label", pyarrow.int64())])
    for split, count in (("train", 3), ("test", 1)):
        images: list[dict[str, object]]
        images = [{"bytes": png(i), "path": None} for i in range(count)]
        images[-1] = images[-1] if split == "test" else {"bytes": None, "path": "x.png"}
        table = pyarrow.table({column: images, "label": [1] * count}, schema)
        table = table.replace_schema_metadata({b"huggingface": features})
        parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    listing, files = opened(tmp_path, tmp_path / "work")
    assert [(i.split, i.category) for i in listing.items] == [
        ("test", 1), ("train", 1), ("train", 1)
    ]  # fmt: skip
    assert listing.classes == ("cat", "dog")
    assert files == [("png", png(0)), ("png", png(0)), ("png", png(1))]
    assert listing.refused == [("train-00000-of-00001.parquet row 2", "no bytes of a picture")]


def write_parquet(path: Path, labels: list[object]) -> None:
    import pyarrow
    from pyarrow import parquet

    images = [{"bytes": png(i), "path": None} for i in range(len(labels))]
    parquet.write_table(pyarrow.table({"image": images, "label": labels}), path)


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
    write_parquet(tmp_path / "a.parquet", labels)
    listing, _ = opened(tmp_path, tmp_path / "work")
    got = [item.category for item in listing.items]
    assert got == want and not any(isinstance(category, bool | float) for category in got)


@pytest.mark.parametrize("label", [0.5, [1], b"x"])
def test_labels_of_parquet_that_are_no_class_are_named(tmp_path: Path, label: object) -> None:
    write_parquet(tmp_path / "a.parquet", [label])
    with pytest.raises(ConfigError, match=r"a\.parquet: row 0: the label .* is neither an integer"):
        opened(tmp_path, tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_jobs_that_list_the_same_parquet_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """The second lists while the first one writes, the third finds the copy and reads from it."""
    write_parquet(tmp_path / "a.parquet", [0, 1])
    one, two, three = (
        ParquetSource([str(tmp_path / "a.parquet")], work_folder=tmp_path / "work")
        for _ in range(3)
    )
    write, listed = one._listed, []

    def interrupted(copy: BinaryIO | None) -> Listing:
        listed.append(run_on_another_node(two))
        return write(copy)

    one._listed = interrupted  # type: ignore[method-assign]
    listed.append(one.list())
    copied = one.plain.stat()
    listed.append(three.list())
    assert one.plain.stat().st_mtime_ns == copied.st_mtime_ns
    for source, listing in zip((two, one, three), listed, strict=True):
        assert [source.read(item) for item in listing.items] == [("png", png(0)), ("png", png(1))]
    assert [path.name for path in (tmp_path / "work").iterdir()] == [one.plain.name]


def run_on_another_node(source: ParquetSource) -> Listing:
    """By a process of the same number, whose host has another name."""
    host = os.uname()
    other = SimpleNamespace(nodename=f"not-{host.nodename}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "uname", lambda: other)
        return source.list()
