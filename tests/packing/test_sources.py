from __future__ import annotations

import gzip
import io
import os
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.support.picture_sources import listed, opened, png, summary, write_files, write_tar
from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.packing.items import Item, Listing, Place, read, split_of
from vae_dist.packing.pack import _check
from vae_dist.packing.sources import number_classes, with_splits_and_categories

HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE
EVIL = ["/etc/evil.png", "../evil.png", "a/../../evil.png", "..\\evil.png", "C:/evil.png"]
ONLY = "only .cls, .json, .mask.png, .txt of a picture's name are taken along"


def write(kind: str, files: dict[str, bytes], folder: Path) -> Path:
    path = folder / f"in{kind}"
    if kind == ".zip":
        with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    return write_tar(path, files) if kind else write_files(path, files)


def item(name: str, category: str | int | None = None) -> Item:
    return Item(name, Place("x"), 1, category=category)


# splits and classes


@pytest.mark.parametrize(
    ("paths", "want"),
    [
        (["a.png", "b.png"], [(None, None)] * 2),
        (["cat/a.png", "dog/x/b.png"], [(None, "cat"), (None, "dog")]),
        (["faces/a.png", "faces/b.png"], [(None, None)] * 2),
        (["s/train/cat/a.png", "s/val/dog/b.png"], [("train", "cat"), ("validation", "dog")]),
        (["train/a.png"], [("train", None)]),
        (["cup/train/good/a.png", "nut/test/bad/b.png"], [("train", "cup"), ("test", "nut")]),
        (["cat/train/a.png", "dog/b.png"], [(None, "cat"), (None, "dog")]),
    ],
)
def test_splits_and_categories_are_read_off_the_paths(
    paths: list[str], want: list[tuple[str | None, str | None]]
) -> None:
    found = with_splits_and_categories([item(path) for path in paths], ())
    assert [(i.split, i.category) for i in found] == want


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test-00000-of-00002.parquet", "test"),
        ("default/validation/0000.parquet", "validation"),
        ("train.zip", "train"),
        ("imagenet-val-000012.tar", "validation"),
        ("crash-test-dummies.tar", None),
        ("0000.parquet", None),
    ],
)
def test_the_split_of_an_archive_is_read_off_its_path(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_names_of_classes_become_numbers_in_alphabetical_order() -> None:
    for names, classes, want in (
        (("dog", "cat", None), ("cat", "dog"), [1, 0, None]),
        (("10", "9"), ("9", "10"), [1, 0]),
        ((3, None), ("a", "b"), [3, None]),
    ):
        listing = Listing([item(f"{n}", n) for n in names], [], [], ("a", "b"))
        number_classes(listing)
        assert ([i.category for i in listing.items], listing.classes) == (want, classes)
    with pytest.raises(ConfigError, match="some classes are named and some are numbers"):
        number_classes(Listing([item("a", "cat"), item("b", 1)], [], []))


def test_a_split_between_classes_is_refused() -> None:
    names = ["train/a.png", "bus/b.png"]
    with pytest.raises(ConfigError, match=r"1 pictures belong to a split .* and 1 to none"):
        _check(PackCommand(), Listing(with_splits_and_categories(list(map(item, names)), ())))


# the same rules for folders, zip files and tars


@pytest.mark.parametrize("kind", ["", ".zip", ".tar"])
def test_pictures_masks_and_what_is_neither(tmp_path: Path, kind: str) -> None:
    files = {
        "cat/a.PNG": png(0), "cat/a.mask.png": png(1), "cat/.hidden.png": png(),
        "dog/b.jpg": png(2), "__MACOSX/cat/._a.png": png(), "Thumbs.db": b"x",
        "dog/c.mask.png": png(), "dog/empty.png": b"", "dog/e.heic": png(3),
        "dog/f": png(4), "README": b"x", "g.psd": b"x",
    }  # fmt: skip
    listing, data = opened(write(kind, files, tmp_path), tmp_path / "work")
    assert summary(listing.items) == {
        "cat/a.PNG": (None, "cat"), "dog/b.jpg": (None, "dog"), "dog/e.heic": (None, "dog"),
        "dog/f": (None, "dog"),
    }  # fmt: skip
    assert data == [png(0), png(2), png(3), png(4)]
    companions = [{m: read(f.place) for m, f in i.companions} for i in listing.items]
    assert companions == [{"mask.png": png(1)}, {}, {}, {}]
    assert listing.lost == [("dog/empty.png", "an empty file")]
    text = f"1 files; {ONLY}" if kind == ".tar" else "1 files that are no pictures"
    assert listing.left_out == [
        ("dog/c.mask.png", "the mask of no picture"),
        ("files without suffix", text),
        ("*.psd", text),
    ]  # fmt: skip
    assert listing.notes == [
        "files without suffix: 1 files are decoded by their content",
        "*.heic: 1 files are decoded by their content",
    ]


@pytest.mark.parametrize("kind", [".zip", ".tar"])
def test_members_of_evil_names_are_refused(tmp_path: Path, kind: str) -> None:
    files = {name.replace("\\", "/") if kind == ".tar" else name: png() for name in EVIL}
    listing, _ = opened(write(kind, {**files, "a.png": png(1)}, tmp_path), tmp_path / "work")
    assert [i.name for i in listing.items] == ["a.png"]
    reasons = dict(listing.lost)
    assert "an absolute path" in reasons["/etc/evil.png"] + reasons["C:/evil.png"]
    assert reasons["a/../../evil.png"] == reasons["../evil.png"] == "a path with .."
    assert not (tmp_path / "evil.png").exists()


# folders


def test_folders_that_are_links_are_followed_once(tmp_path: Path) -> None:
    write_files(tmp_path / "in/train", {"a/0.png": png()})
    write_files(tmp_path / "elsewhere", {"a/1.png": png(1)})
    os.symlink(tmp_path / "elsewhere", tmp_path / "in/test")
    os.symlink(tmp_path / "in", tmp_path / "in/train/loop")
    os.symlink(tmp_path / "nowhere", tmp_path / "in/train/dangling.jpg")
    listing = listed(tmp_path / "in", tmp_path / "work")
    assert summary(listing.items) == {
        "test/a/1.png": ("test", "a"),
        "train/a/0.png": ("train", "a"),
    }
    assert listing.lost == [("train/dangling.jpg", "cannot be read (No such file or directory)")]
    assert listing.left_out == [("train/loop/", "a link to a folder that is listed already")]


def test_pictures_beside_archives_are_packed_too(tmp_path: Path) -> None:
    write_files(tmp_path / "in", {"pics/0.png": png(0)})
    write_tar(tmp_path / "in/extra.tar", {"x.png": png(1)})
    write_tar(tmp_path / "in/more.tar.gz", {"y.png": png(2)}, "w:gz")
    write(".zip", {"z.png": png(3)}, tmp_path / "in").rename(tmp_path / "in/last.ZIP")
    _, files = opened(tmp_path / "in", tmp_path / "work")
    assert files == [png(0), png(1), png(3), png(2)]


def test_a_folder_of_splits_with_shards_is_packed_again(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "in" / split).mkdir(parents=True)
        write_tar(tmp_path / "in" / split / "s-0.tar", {"0.png": png(), "0.cls": b"3"})
    written = {"pack.json": b"{}", "names.txt": b"", "contact-sheet.png": png(), "_info.json": b""}
    listing = listed(write_files(tmp_path / "in", written), tmp_path / "work")
    assert [(i.split, i.category) for i in listing.items] == [("train", 3), ("validation", 3)]
    assert not listing.lost and not listing.left_out


def test_parts_of_a_download_are_no_classes(tmp_path: Path) -> None:
    files = {f"0000{k}/{k}.jpg": png(k) for k in range(2)}
    files |= {f"0000{k}_stats.json": b"{}" for k in range(2)}
    listing = listed(write_files(tmp_path, files), tmp_path / "work")
    assert [i.category for i in listing.items] == [None, None]


def test_patterns_lists_and_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(2):
        write_tar(tmp_path / f"{k}.tar", {"0.png": png(k), "0.mask.png": png(2 + k)})
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in (f"{tmp_path}/*.tar", "~/[01].tar", [str(tmp_path / "0.tar"), "~/1.tar"]):
        listing, files = opened(spec, tmp_path / "work")
        assert files == [png(0), png(1)]
        assert [read(dict(i.companions)["mask.png"].place) for i in listing.items] == [
            png(2), png(3)
        ]  # fmt: skip
    (tmp_path / "2024").mkdir()
    write_files(tmp_path / "2024", {"a.png": png()})
    monkeypatch.chdir(tmp_path)
    assert len(listed(2024, tmp_path / "work").items) == 1


def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9\n.png", "wb") as file:
        file.write(png())
    assert opened(tmp_path / "in", tmp_path / "work")[1] == [png()]


# zip files


def test_a_zip_that_has_a_name_twice_gives_both_pictures(tmp_path: Path) -> None:
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        for k in range(2):
            archive.writestr("a.png", png(k))
    assert opened(path, tmp_path / "work")[1] == [png(0), png(1)]


def test_a_zip_with_backslashes_and_encrypted_members(tmp_path: Path) -> None:
    path = write(".zip", {"train\\cat\\a.png": png(), "b.png": png()}, tmp_path)
    data = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rindex(mark) + flags] |= 1  # of b.png
    path.write_bytes(data)
    listing = listed(path, tmp_path / "work")
    assert summary(listing.items) == {"train/cat/a.png": ("train", "cat")}
    assert listing.lost == [("b.png", "encrypted")]


# tars


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_of_every_compression(tmp_path: Path, mode: str) -> None:
    path = tmp_path / f"in.tar{mode[1:].replace(':', '.')}"
    write_tar(path, {"./x/a.png": png(0), "./x/a.cls": b"7", "./x/b.png": png(1)}, mode)
    listing, files = opened(path, tmp_path / "work")
    assert [i.category for i in listing.items] == [7, None] and files == [png(0), png(1)]


def test_links_of_a_tar_are_read_or_named(tmp_path: Path) -> None:
    links = {
        "b.png": (HARD, "x/a.png"), "x/c.png": (SYMBOLIC, "a.png"),
        "d.png": (SYMBOLIC, "/etc/passwd"), "e.png": (tarfile.FIFOTYPE, ""),
    }  # fmt: skip
    path = write_tar(tmp_path / "in.tar", {"x/a.png": png()}, links=links)
    listing, files = opened(path, tmp_path / "work")
    assert [i.name for i in listing.items] == ["x/a.png", "b.png", "x/c.png"]
    assert files == [png()] * 3
    assert listing.lost == [
        ("d.png", "a link to /etc/passwd, which is not in the tar"),
        ("e.png", "a member of type '6', no regular file"),
    ]


def test_what_follows_the_end_mark_of_a_tar_is_named(tmp_path: Path) -> None:
    one, two = (write_tar(tmp_path / f"{k}.tar", {f"{k}.png": png(k)}) for k in range(2))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    listing = listed(one, tmp_path / "work")
    assert [i.name for i in listing.items] == ["0.png"]
    assert listing.left_out == [
        ("0.tar", "more follows its end mark at byte 1024; join with tar --concatenate")
    ]


def test_other_images_of_a_sample_are_no_pictures(tmp_path: Path) -> None:
    members = {"0.jpg": png(), "0.depth.png": png(1), "img.1.jpg": png(2), "img.2.jpg": png(3),
               "0.json": b"{}", "0.npz": b"x", "notes.txt": b""}  # fmt: skip
    listing, files = opened(write_tar(tmp_path / "in.tar", members), tmp_path / "work")
    assert files == [png(0), png(2), png(3)]
    assert dict(listing.items[0].companions).keys() == {"json"}
    assert listing.left_out == [
        ("*.depth.png", f"1 files; {ONLY}"), ("*.npz", f"1 files; {ONLY}"),
        ("*.txt", f"1 files; {ONLY}"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("in.zip", b"PK\x03\x04 no", r"in\.zip: no readable zip file"),
        ("in.tar", b"no tar" * 1000, r"in\.tar: byte 0: damaged tar header"),
        ("in.tar.gz", gzip.compress(b"x" * 5000, mtime=0)[:-9], r"in\.tar\.gz: cannot be unpacked"),
        ("in.tgz", gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 9, r"in\.tgz: cannot be unpacked"),
        ("in.rar", b"x", "is nothing that can be packed; give a folder of pictures"),
        ("in.parquet", b"x", r"in\.parquet: cannot be read"),
    ],
)
def test_damaged_archives_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        listed(tmp_path / name, tmp_path / "work")
    assert not (tmp_path / "work").exists() or not list((tmp_path / "work").iterdir())
    with pytest.raises(ConfigError, match=r"nowhere: no such file; give a folder of pictures"):
        listed(tmp_path / "nowhere", tmp_path)


def test_raw_pixels_become_png(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(range(24)))
    for shape, size, mode in (((4, 3), (3, 4), "L"), ((3, 2, 2), (2, 2), "RGB")):
        image = Image.open(io.BytesIO(read(Place(str(tmp_path / "raw"), 2, 12, shape))))
        assert image.size == size and image.mode == mode
    assert image.getpixel((1, 0)) == (3, 7, 11)
