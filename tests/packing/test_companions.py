"""Files that go with a picture: masks everywhere, .cls, .json and .txt in tars."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.support.picture_sources import opened, png, write_tar
from vae_dist.config.errors import ConfigError
from vae_dist.packing.items import Item
from vae_dist.packing.open import open_source

FILES = {"cat/a.PNG": png(0), "cat/a.mask.png": png(1), "dog/b.jpg": png(2), "dog/c.mask.png": b""}


def write(files: dict[str, bytes], kind: str, folder: Path) -> Path:
    path = folder / f"in{kind}"
    if kind == ".tar":
        write_tar(path, files)
    elif kind == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def companions(item: Item, source: Path, work: Path) -> dict[str, bytes]:
    opened_source = open_source(str(source), labels="", work_folder=work)
    opened_source.list()
    return {member: opened_source.read(file)[1] for member, file in item.companions}


@pytest.mark.parametrize("kind", ["", ".zip", ".tar"])
def test_a_mask_goes_with_its_picture_and_is_none(tmp_path: Path, kind: str) -> None:
    source = write(FILES, kind, tmp_path)
    listing, files = opened(source, tmp_path / "work")
    assert [(item.name, item.category) for item in listing.items] == [
        ("cat/a.PNG", "cat"),
        ("dog/b.jpg", "dog"),
    ]
    assert [data for _, data in files] == [png(0), png(2)]
    found = [companions(item, source, tmp_path / "work") for item in listing.items]
    assert found == [{"mask.png": png(1)}, {}]
    assert listing.refused == [("dog/c.mask.png", "the mask of no picture")]


@pytest.mark.parametrize("kind", ["", ".zip", ".tar"])
def test_masks_alone_are_no_pictures(tmp_path: Path, kind: str) -> None:
    listing, _ = opened(write({"a.mask.png": png()}, kind, tmp_path), tmp_path / "work")
    assert listing.items == [] and listing.refused == [("a.mask.png", "the mask of no picture")]


def test_what_a_tar_says_of_a_sample_is_taken_along_and_the_rest_named(tmp_path: Path) -> None:
    members = {"0.png": png(0), "0.json": b'{"label": 3}', "0.txt": b"a cat", "0.cls": b"5",
               "0.npz": b"x", "1.npz": b"x", "notes.txt": b"", "README": b""}  # fmt: skip
    source = write(members, ".tar", tmp_path)
    listing, _ = opened(source, tmp_path / "work")
    (item,) = listing.items
    assert item.category == 5
    found = companions(item, source, tmp_path / "work")
    assert found == {"json": b'{"label": 3}', "txt": b"a cat"}
    only = "files; only .cls, .json, .mask.png, .txt of a picture's name are taken along"
    assert listing.refused == [
        ("files without suffix", f"1 {only}"),
        ("*.npz", f"2 {only}"),
        ("*.txt", f"1 {only}"),
    ]


def test_samples_of_two_tars_may_have_the_same_names(tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", {"0.png": png(i), "0.mask.png": png(2 + i)})
    paths = [str(tmp_path / f"{i}.tar") for i in range(2)]
    source = open_source(paths, labels="", work_folder=tmp_path / "work")
    masks = [source.read(dict(item.companions)["mask.png"]) for item in source.list().items]
    assert masks == [("png", png(2)), ("png", png(3))]


def test_a_csv_file_does_not_name_masks(tmp_path: Path) -> None:
    source = write({"a.png": png(), "a.mask.png": png()}, "", tmp_path)
    labels = tmp_path / "labels.csv"
    labels.write_text("path,label\na.png,3\n")
    listing, _ = opened(source, tmp_path / "work", labels=str(labels))
    assert [member for member, _ in listing.items[0].companions] == ["mask.png"]
    assert listing.items[0].category == 3 and listing.refused == []
    with pytest.raises(ConfigError, match=r"labels=.*nowhere: cannot be read"):
        opened(source, tmp_path / "work", labels=str(tmp_path / "nowhere"))
