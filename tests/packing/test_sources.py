from __future__ import annotations

import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.picture_sources import opened, png, summary, write
from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.packing.items import Item, Listing, Place, read, split_of
from vae_dist.packing.pack import _check
from vae_dist.packing.sources import number_classes, with_splits_and_categories

HARD, SYMBOLIC, FIFO = tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE
ONLY = "only .cls, .json, .mask.png, .txt of a picture's name are taken along"


def item(name: str, category: str | int | None = None) -> Item:
    return Item(name, Place("x"), 1, category=category)


# splits and classes


@pytest.mark.parametrize(
    ("paths", "want"),
    [
        ("a.png b.png", [(None, None)] * 2),
        ("cat/a.png dog/x/b.png", [(None, "cat"), (None, "dog")]),
        ("faces/a.png faces/b.png", [(None, None)] * 2),
        ("s/train/cat/a.png s/val/dog/b.png", [("train", "cat"), ("validation", "dog")]),
        ("train/a.png", [("train", None)]),
        ("cup/train/good/a.png nut/test/bad/b.png", [("train", "cup"), ("test", "nut")]),
        ("cat/train/a.png dog/b.png", [(None, "cat"), (None, "dog")]),
    ],
)
def test_splits_and_categories_are_read_off_the_paths(paths: str, want: list[object]) -> None:
    found = with_splits_and_categories(list(map(item, paths.split())), ())
    assert [(i.split, i.category) for i in found] == want


def test_a_split_between_classes_is_refused() -> None:
    mixed = with_splits_and_categories([item("train/a.png"), item("bus/b.png")], ())
    with pytest.raises(ConfigError, match=r"1 pictures belong to a split .* and 1 to none"):
        _check(PackCommand(), Listing(mixed))


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


def test_names_of_classes_become_numbers_in_their_order() -> None:
    for names, classes, want in (
        (("dog", "cat", None), ("cat", "dog"), [1, 0, None]),
        (("10", "9"), ("9", "10"), [1, 0]),
        ((3, None), ("a", "b"), [3, None]),
    ):
        listing = Listing([item(f"{n}", n) for n in names], classes=("a", "b"))
        number_classes(listing)
        assert ([i.category for i in listing.items], listing.classes) == (want, classes)
    with pytest.raises(ConfigError, match="some classes are named and some are numbers"):
        number_classes(Listing([item("a", "cat"), item("b", 1)]))


# the same rules for folders, zip files and tars


@pytest.mark.parametrize("kind", ["in", "in.zip", "in.tar"])
def test_pictures_masks_and_what_is_neither(tmp_path: Path, kind: str) -> None:
    files = {
        "cat/a.PNG": png(0), "cat/a.mask.png": png(1), "cat/.hidden.png": png(),
        "dog/b.jpg": png(2), "__MACOSX/cat/._a.png": png(), "Thumbs.db": b"x",
        "dog/c.mask.png": png(), "dog/empty.png": b"", "dog/e.heic": png(3),
        "dog/f": png(4), "README": b"x", "g.psd": b"x",
    }  # fmt: skip
    listing, data = opened(write(tmp_path / kind, files), tmp_path / "work")
    assert summary(listing.items) == {
        "cat/a.PNG": (None, "cat"), "dog/b.jpg": (None, "dog"), "dog/e.heic": (None, "dog"),
        "dog/f": (None, "dog"),
    }  # fmt: skip
    assert data == [png(0), png(2), png(3), png(4)]
    companions = [{m: read(f.place) for m, f in i.companions} for i in listing.items]
    assert companions == [{"mask.png": png(1)}, {}, {}, {}]
    assert listing.lost == [("dog/empty.png", "an empty file")]
    text = f"1 files; {ONLY}" if kind == "in.tar" else "1 files that are no pictures"
    others = [("files without suffix", text), ("*.psd", text)]
    assert listing.left_out == [("dog/c.mask.png", "the mask of no picture"), *others]
    kinds = ("files without suffix", "*.heic")
    assert listing.notes == [f"{kind}: 1 files are decoded by their content" for kind in kinds]


@pytest.mark.parametrize("kind", ["in.zip", "in.tar"])
def test_members_of_evil_names_are_refused(tmp_path: Path, kind: str) -> None:
    names = ["/etc/evil.png", "../evil.png", "a/../../evil.png", "C:/evil.png"]
    names += ["..\\evil.png"] if kind == "in.zip" else []
    files = {**dict.fromkeys(names, png()), "a.png": png(1)}
    listing, _ = opened(write(tmp_path / kind, files), tmp_path / "work")
    assert [i.name for i in listing.items] == ["a.png"] and len(listing.lost) == len(names)
    reasons = dict(listing.lost)
    assert reasons["/etc/evil.png"] == reasons["C:/evil.png"] == "an absolute path"
    assert reasons["a/../../evil.png"] == reasons["../evil.png"] == "a path with .."


@pytest.mark.parametrize(
    ("image_key", "kind", "want"),
    [
        ("", "in.tar", {"0.jpg": 0, "img.1.jpg": 3, "img.2.jpg": 4}),
        ("depth.png", "in.tar", {"0.depth.png": 1}),
        ("PNG", "in.tar", {"0.png": 2}),
        ("depth.png", "in", {"0.depth.png": 1}),
    ],
)
def test_one_picture_of_a_sample_is_packed(
    tmp_path: Path, image_key: str, kind: str, want: dict[str, int]
) -> None:
    files = {
        "0.jpg": png(0), "0.depth.png": png(1), "0.png": png(2), "img.1.jpg": png(3),
        "img.2.jpg": png(4), "0.json": b"{}", "0.cls": b"7", "0.npz": b"x", "notes.txt": b"",
    }  # fmt: skip
    source = write(tmp_path / kind, files)
    listing, data = opened(source, tmp_path / "work", image_key=image_key)
    assert [i.name for i in listing.items] == list(want)
    assert data == [png(seed) for seed in want.values()]
    if kind == "in.tar":
        assert listing.items[0].category == 7
        assert [member for member, _ in listing.items[0].companions] == ["json"]
    left_out = dict(listing.left_out)
    assert {"*.npz", "*.depth.png" if not image_key else "*.jpg"} <= left_out.keys()
    assert len(listing.notes) == (not image_key)  # of img.1 and img.2


# folders


def test_folders_that_are_links_are_followed_once_and_devices_never(tmp_path: Path) -> None:
    write(tmp_path / "in/train", {"a/0.png": png()})
    write(tmp_path / "elsewhere", {"a/1.png": png(1)})
    os.symlink(tmp_path / "elsewhere", tmp_path / "in/test")
    os.symlink(tmp_path / "in", tmp_path / "in/train/loop")
    os.symlink(tmp_path / "nowhere", tmp_path / "in/train/dangling.jpg")
    os.mkfifo(tmp_path / "in/train/fifo.jpg")
    os.mkfifo(tmp_path / "in/fifo.tar")
    listing, _ = opened(tmp_path / "in", tmp_path / "work")
    assert summary(listing.items) == {
        "test/a/1.png": ("test", "a"),
        "train/a/0.png": ("train", "a"),
    }
    assert listing.lost == [
        ("train/dangling.jpg", "cannot be read (No such file or directory)"),
        ("train/fifo.jpg", "no regular file"),
    ]
    link = ("train/loop/", "a link to a folder that is listed already")
    assert listing.left_out == [("fifo.tar", "no regular file"), link]
    with pytest.raises(ConfigError, match=r"fifo\.tar: no regular file"):
        opened(tmp_path / "in/fifo.tar", tmp_path / "work")


def test_pictures_beside_archives_are_packed_too(tmp_path: Path) -> None:
    write(tmp_path / "in", {"pics/0.png": png(0)})
    write(tmp_path / "in/extra.tar", {"x.png": png(1)})
    write(tmp_path / "in/more.tar.gz", {"y.png": png(2)}, "w:gz")
    write(tmp_path / "last.zip", {"z.png": png(3)}).rename(tmp_path / "in/last.ZIP")
    assert opened(tmp_path / "in", tmp_path / "work")[1] == [png(0), png(1), png(3), png(2)]


def test_a_folder_of_splits_with_shards_is_packed_again(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "in" / split).mkdir(parents=True)
        write(tmp_path / "in" / split / "s-0.tar", {"0.png": png(), "0.cls": b"3"})
    written = {"pack.json": b"{}", "names.txt": b"", "contact-sheet.png": png(), "_info.json": b""}
    listing, _ = opened(write(tmp_path / "in", written), tmp_path / "work")
    assert [(i.split, i.category) for i in listing.items] == [("train", 3), ("validation", 3)]
    assert not listing.lost and not listing.left_out


def test_parts_of_a_download_are_no_classes(tmp_path: Path) -> None:
    files = {f"0000{k}/{k}.jpg": png(k) for k in range(2)}
    files |= {f"0000{k}_stats.json": b"{}" for k in range(2)}
    listing, _ = opened(write(tmp_path, files), tmp_path / "work")
    assert [i.category for i in listing.items] == [None, None]


def test_patterns_lists_homes_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(2):
        write(tmp_path / f"{k}.tar", {"0.png": png(k)})
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in (f"{tmp_path}/*.tar", "~/[01].tar", [str(tmp_path / "0.tar"), "~/1.tar"]):
        assert opened(spec, tmp_path / "work")[1] == [png(0), png(1)]
    (tmp_path / "2024").mkdir()
    with open(os.fsencode(tmp_path / "2024") + b"/caf\xe9\n.png", "wb") as file:
        file.write(png())
    monkeypatch.chdir(tmp_path)
    assert opened(2024, tmp_path / "work")[1] == [png()]


# archives


def test_a_zip_of_double_names_backslashes_encryption_and_bombs(tmp_path: Path) -> None:
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train\\cat\\a.png", png(0))
        archive.writestr("train\\cat\\b.png", png(1))
        archive.writestr("bomb.png", bytes(1 << 27))
        archive.writestr("secret.png", png())
    data = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rindex(mark) + flags] |= 1  # of the last member
    path.write_bytes(data.replace(b"cat/b.png", b"cat/a.png").replace(b"t\\b.png", b"t\\a.png"))
    listing, files = opened(path, tmp_path / "work")
    assert [i.name for i in listing.items] == ["train/cat/a.png"] * 2
    assert files == [png(0), png(1)]
    assert [name for name, _ in listing.lost] == ["bomb.png", "secret.png"]
    assert listing.lost[1] == ("secret.png", "encrypted")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_of_every_compression(tmp_path: Path, mode: str) -> None:
    path = tmp_path / f"in.tar{mode[1:].replace(':', '.')}"
    write(path, {"./x/a.png": png(0), "./x/a.cls": b"7", "./x/b.png": png(1)}, mode)
    listing, files = opened(path, tmp_path / "work")
    assert [i.category for i in listing.items] == [7, None] and files == [png(0), png(1)]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2"])
def test_a_small_archive_does_not_fill_the_disk(tmp_path: Path, mode: str) -> None:
    path = write(tmp_path / "in.tar.gz", {"a.png": bytes(70 << 20)}, mode)
    with pytest.raises(ConfigError, match="bytes hold more than 67108864; unpack it by hand"):
        opened(path, tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_links_of_a_tar_are_read_or_named_and_what_follows_its_end(tmp_path: Path) -> None:
    links = {
        "b.png": (HARD, "x/a.png"), "x/c.png": (SYMBOLIC, "a.png"),
        "d.png": (SYMBOLIC, "/etc/passwd"), "e.png": (FIFO, ""),
    }  # fmt: skip
    path = write(tmp_path / "in.tar", {"x/a.png": png()}, **links)
    path.write_bytes(path.read_bytes() + write(tmp_path / "1.tar", {"1.png": png()}).read_bytes())
    listing, files = opened(path, tmp_path / "work")
    assert [i.name for i in listing.items] == ["x/a.png", "b.png", "x/c.png"]
    assert files == [png()] * 3
    assert listing.lost == [
        ("d.png", "a link to /etc/passwd, which is not in the tar"),
        ("e.png", "a member of type '6', no regular file"),
    ]
    (left_out,) = listing.left_out
    assert left_out[0] == "in.tar" and "more follows its end mark at byte" in left_out[1]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("in.zip", b"PK\x03\x04 no", r"in\.zip: no readable zip file"),
        ("in.tar", b"no tar" * 1000, r"in\.tar: byte 0: damaged tar header"),
        ("in.tar.gz", b"\x1f\x8b\x08" + bytes(9), r"in\.tar\.gz: cannot be unpacked"),
        ("in.tgz", b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 9, r"in\.tgz: cannot be unpacked"),
        ("in.rar", b"x", "is nothing that can be packed; give a folder of pictures"),
        ("in.parquet", b"x", r"in\.parquet: cannot be read"),
    ],
)
def test_damaged_archives_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / name, tmp_path / "work")
    assert not (tmp_path / "work").exists() or not list((tmp_path / "work").iterdir())
    with pytest.raises(ConfigError, match=r"nowhere: no such file; give a folder of pictures"):
        opened(tmp_path / "nowhere", tmp_path)
