from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.support.picture_sources import opened, png, summary, write
from vae_dist.config.errors import ConfigError
from vae_dist.packing.items import Listing


def labelled(folder: Path, text: str, names: list[str], **keys: str) -> Listing:
    source = write(folder / "in", dict.fromkeys(names, png()))
    (folder / "labels.csv").write_text(text)
    return opened(source, folder / "work", labels=str(folder / "labels.csv"), **keys)[0]


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
        assert files[0] == png(1)
        assert [name for name, _ in listing.left_out] == ["img_align_celeba/000004.jpg"]


def test_labels_from_a_csv_file(tmp_path: Path) -> None:
    text = "file,label,split,age\n0.png,tabby,train,3\n1.png,siam,val,4\n"
    listing = labelled(tmp_path, text, ["0.png", "1.png", "2.png", "0.mask.png"])
    assert summary(listing.items) == {"0.png": ("train", "tabby"), "1.png": ("validation", "siam")}
    assert listing.items[0].extra == {"age": "3"} and len(listing.items[0].companions) == 1
    assert listing.left_out == [("2.png", f"not in labels={tmp_path / 'labels.csv'}")]


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        (["5", "", "7"], [5, None, 7]),
        (["b", " ", "a"], ["b", None, "a"]),
        (["10.0", "", "3.0"], [10, None, 3]),
        (["1.5", "2.0"], ["1.5", "2.0"]),
    ],
)
def test_labels_are_numbers_where_all_are(
    tmp_path: Path, labels: list[str], want: list[object]
) -> None:
    text = "path,label\n" + "\n".join(f"{i}.png,{label}" for i, label in enumerate(labels))
    listing = labelled(tmp_path, text, [f"{i}.png" for i in range(len(labels))])
    assert [item.category for item in listing.items] == want


def test_the_column_of_the_class_may_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "path,species\n0.png,4\n"
    assert labelled(tmp_path, text, ["0.png"]).items[0].category is None
    assert "hold no label or class or category: no classes" in capsys.readouterr().err
    (item,) = labelled(tmp_path, text, ["0.png"], label_column="species").items
    assert item.category == 4 and not item.extra


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"hold none of path, file"),
        ("path,label\nx.png\n", "line 2 has another number of columns"),
        ("path,split\n0.png,holdout\n", "line 2: split 'holdout' is unknown"),
        ("path,label\nx.png,1\n", r"none of the 2 pictures: it has x\.png, the source bus/0\.png"),
        ("path,label\n0.png,1\n", r"0\.png fits bus/0\.png and car/0\.png; name each picture by"),
        ("path,label\n0.png,1\n0.png,2\n", r"line 3: 0\.png is there twice, and the lines differ"),
    ],
)
def test_wrong_csv_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        labelled(tmp_path, text, ["bus/0.png", "car/0.png"])


def test_a_path_wins_over_a_name(tmp_path: Path) -> None:
    text = "path,label\nbus/0.png,1\nbus/0.png,1\n0.png,2\n"
    listing = labelled(tmp_path, text, ["bus/0.png", "car/0.png"])
    assert [item.category for item in listing.items] == [1, 2]
