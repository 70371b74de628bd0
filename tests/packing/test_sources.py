"""What a source holds: splits, classes and samples of folders and archives, and their tables."""

import gzip
import os
import tarfile
import zipfile

import pytest

from tests.support.picture_sources import opened, png, refused, write
from vae_dist.config.errors import ConfigError
from vae_dist.packing.items import Item, Listing, Place, read
from vae_dist.packing.sources import number_classes, with_splits_and_categories


def item(name, category=None):
    return Item(name, Place("x", 0, 1), category=category)


def summary(listing):
    return {item.name: (item.split, item.category) for item in listing.items}


def test_splits_and_categories_are_read_off_the_paths():
    for paths, want in (
        ("a.png b.png", [(None, None)] * 2),
        ("cat/a.png dog/x/b.png", [(None, "cat"), (None, "dog")]),
        ("faces/a.png faces/b.png", [(None, None)] * 2),
        ("s/train/cat/a.png s/val/dog/b.png", [("train", "cat"), ("validation", "dog")]),
        ("train/a.png", [("train", None)]),
        ("cup/train/good/a.png nut/test/bad/b.png", [("train", "cup"), ("test", "nut")]),
        ("cat/train/a.png dog/b.png", [(None, "cat"), (None, "dog")]),
    ):
        found = with_splits_and_categories(list(map(item, paths.split())), ())
        assert [(i.split, i.category) for i in found] == want


def test_numbers_of_classes():
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


@pytest.mark.parametrize("kind", ["in", "in.zip", "in.tar"])
def test_pictures_masks_and_what_is_neither(tmp_path, kind):
    files = {
        "cat/a.PNG": png(0), "cat/a.mask.png": png(1), "cat/.hidden.png": png(),
        "dog/b.jpg": png(2), "__MACOSX/cat/._a.png": png(), "Thumbs.db": b"x",
        "dog/c.mask.png": png(), "dog/empty.png": b"", "dog/e.heic": png(3),
        "dog/f": png(4), "README": b"x", "g.psd": b"x",
    }  # fmt: skip
    evil = ["/etc/evil.png", "../evil.png", "a/../../evil.png", "C:/evil.png"] * (kind != "in")
    evil += ["..\\evil.png"] * (kind == "in.zip")
    files |= dict.fromkeys(evil, png())
    listing, data = opened(write(tmp_path / kind, files), tmp_path / "work")
    assert summary(listing) == {
        "cat/a.PNG": (None, "cat"), "dog/b.jpg": (None, "dog"), "dog/e.heic": (None, "dog"),
        "dog/f": (None, "dog"),
    }  # fmt: skip
    assert data == [png(0), png(2), png(3), png(4)]
    companions = [{m: read(f.place) for m, f in i.companions} for i in listing.items]
    assert companions == [{"mask.png": png(1)}, {}, {}, {}]
    unsafe = [e.replace("\\", "/") + ": an absolute path, or one with .." for e in evil]
    assert sorted(listing.lost) == sorted(["dog/empty.png: an empty file", *unsafe])
    kinds = ("files without suffix", "*.mask.png", "*.psd")
    assert listing.left_out == [f"{kind}: 1 files that are not packed" for kind in kinds]


def test_one_picture_of_a_sample_is_packed(tmp_path):
    files = {
        "0.jpg": png(0), "0.depth.png": png(1), "0.png": png(2), "img.1.jpg": png(3),
        "img.2.jpg": png(4), "0.json": b"{}", "0.cls": b"cat", "0.npz": b"x", "notes.txt": b"",
    }  # fmt: skip
    for image_key, kind, want in (
        ("", "in.tar", {"0.jpg": 0, "img.1.jpg": 3, "img.2.jpg": 4}),
        ("depth.png", "in.tar", {"0.depth.png": 1}),
        ("PNG", "in.tar", {"0.png": 2}),
        ("depth.png", "in", {"0.depth.png": 1}),
    ):
        source = write(tmp_path / kind, files)
        listing, data = opened(source, tmp_path / "work", image_key=image_key)
        assert [i.name for i in listing.items] == list(want)
        assert data == [png(seed) for seed in want.values()]
        if kind == "in.tar":
            assert listing.items[0].category == "cat"
            assert [member for member, _ in listing.items[0].companions] == ["json"]
        left_out = {text.partition(":")[0] for text in listing.left_out}
        assert {"*.npz", "*.depth.png" if not image_key else "*.jpg"} <= left_out


def test_folders_that_are_links_are_followed_once_and_devices_never(tmp_path):
    write(tmp_path / "in/train", {"a/0.png": png()})
    write(tmp_path / "elsewhere", {"a/1.png": png(1)})
    os.symlink(tmp_path / "elsewhere", tmp_path / "in/test")
    os.symlink(tmp_path / "in", tmp_path / "in/train/loop")
    os.symlink(tmp_path / "nowhere", tmp_path / "in/train/dangling.jpg")
    os.mkfifo(tmp_path / "in/train/fifo.jpg")
    os.mkfifo(tmp_path / "in/fifo.tar")
    listing, _ = opened(tmp_path / "in", tmp_path / "work")
    assert summary(listing) == {"test/a/1.png": ("test", "a"), "train/a/0.png": ("train", "a")}
    missing = "train/dangling.jpg: cannot be read (No such file or directory)"
    assert listing.lost == [missing, "train/fifo.jpg: no regular file"]
    link = "train/loop/: a link to a folder that is listed already"
    assert listing.left_out == ["fifo.tar: no regular file", link]
    refused(tmp_path / "in/fifo.tar", tmp_path / "work", r"fifo\.tar: no regular file")


def test_archives_and_shards_in_folders_and_parts_of_a_download(tmp_path):
    write(tmp_path / "a", {"pics/0.png": png(0)})
    write(tmp_path / "a/crash-test-dummies.tar", {"x.png": png(1)})
    write(tmp_path / "a/my-val-000012.tar.gz", {"y.png": png(2)}, "w:gz")
    write(tmp_path / "last.zip", {"z.png": png(3)}).rename(tmp_path / "a/train.ZIP")
    listing, data = opened(tmp_path / "a", tmp_path / "work")
    assert [item.split for item in listing.items] == [None, None, "validation", "train"]
    assert data == [png(k) for k in range(4)]
    ours = {"pack.json": b"{}", "names.txt": b"", "contact-sheet.png": png(), "_info.json": b""}
    write(tmp_path / "b", ours)
    for split in ("train", "val"):
        write(tmp_path / "b" / split / "s-0.tar", {"0.png": png(), "0.cls": b"3"})
    listing, _ = opened(tmp_path / "b", tmp_path / "work")
    assert [(i.split, i.category) for i in listing.items] == [("train", 3), ("validation", 3)]
    assert not listing.lost and not listing.left_out
    files = {f"0000{k}/{k}.jpg": png(k) for k in range(2)}
    files |= {f"0000{k}_stats.json": b"{}" for k in range(2)}
    listing, _ = opened(write(tmp_path / "c", files), tmp_path / "work")
    assert [i.category for i in listing.items] == [None, None]


def test_patterns_lists_homes_and_names(tmp_path, monkeypatch):
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


def test_a_zip_of_double_names_backslashes_encryption_and_bombs(tmp_path):
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train\\cat\\a.png", png(0))
        archive.writestr("train\\cat\\b.png", png(1))
        archive.writestr("bomb.png", bytes((1 << 26) + 1))
        archive.writestr("secret.png", png())
    data = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rindex(mark) + flags] |= 1  # of the last member
    path.write_bytes(data.replace(b"cat/b.png", b"cat/a.png").replace(b"t\\b.png", b"t\\a.png"))
    listing, files = opened(path, tmp_path / "work")
    assert [i.name for i in listing.items] == ["train/cat/a.png"] * 2
    assert files == [png(0), png(1)]
    bomb, secret = listing.lost
    assert bomb.startswith("bomb.png: ") and secret == "secret.png: encrypted"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_of_every_compression_with_links_and_what_follows_its_end(tmp_path, mode):
    files = {
        "./x/a.png": png(0), "./x/a.cls": b"7", "./x/b.png": png(1),
        "b.png": (tarfile.LNKTYPE, "./x/b.png"), "x/c.png": (tarfile.SYMTYPE, "b.png"),
        "d.png": (tarfile.SYMTYPE, "/etc/passwd"), "e.png": (tarfile.FIFOTYPE, ""),
    }  # fmt: skip
    path = write(tmp_path / f"in.tar{mode[1:].replace(':', '.')}", files, mode)
    if mode == "w":
        path.write_bytes(path.read_bytes() + write(tmp_path / "1.tar", files).read_bytes())
    listing, data = opened(path, tmp_path / "work")
    assert [i.name for i in listing.items] == ["./x/a.png", "./x/b.png", "b.png", "x/c.png"]
    assert listing.items[0].category == 7 and data == [png(0), png(1), png(1), png(1)]
    assert listing.lost == [
        "d.png: a link to /etc/passwd, which is not in the tar",
        "e.png: a member of type '6', no regular file",
    ]
    ends = [text.partition(" at byte")[0] for text in listing.left_out]
    assert ends == ["in.tar: more follows its end mark"] * (mode == "w")


def test_archives_that_cannot_be_opened_are_named(tmp_path):
    for name, data, message in (
        ("in.zip", b"PK\x03\x04 no", r"in\.zip: no readable zip file"),
        ("in.tar", b"no tar" * 1000, r"in\.tar: byte 0: damaged tar header"),
        ("in.tar.gz", b"\x1f\x8b\x08" + bytes(9), r"in\.tar\.gz: cannot be unpacked"),
        ("in.tgz", b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 9, r"in\.tgz: cannot be unpacked"),
        ("bomb.tar.gz", gzip.compress(bytes(65 << 20)), "hold more than 67108864; unpack it by"),
        ("in.parquet", b"x", r"in\.parquet: cannot be read"),
    ):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, tmp_path / "work", message)
    assert not list(tmp_path.glob("work/*"))
    refused(tmp_path / "nowhere", tmp_path / "work", "nowhere: no such file; give a folder of")


def test_celeba_after_its_lists(tmp_path):
    names = [f"{i:06d}.jpg" for i in range(1, 5)]
    pictures = {f"img_align_celeba/{name}": png(i) for i, name in enumerate(names, 1)}
    write(tmp_path / "img_align_celeba.zip", pictures)
    partition = "".join(f"{name} {split}\n" for split, name in enumerate(names[:3]))
    attributes = "4\nSmiling Young \n" + "".join(f"{name}  1 -1\n" for name in names)
    (tmp_path / "list_eval_partition.txt").write_text(partition)
    (tmp_path / "list_attr_celeba.txt").write_text(attributes)
    for path in (tmp_path, tmp_path / "img_align_celeba.zip"):
        listing, files = opened(path, tmp_path / "work")
        assert [item.split for item in listing.items] == ["train", "validation", "test"]
        assert listing.items[1].extra == {"attributes": {"Smiling": 1, "Young": -1}}
        assert files == [png(1), png(2), png(3)]
        (left_out,) = listing.left_out
        assert left_out.startswith("img_align_celeba/000004.jpg: not in ")


def labelled(folder, text, **keys):
    names = ("0.png", "0.mask.png", "1.png", "2.png", "bus/3.png", "car/3.png")
    source = write(folder / "in", dict.fromkeys(names, png()))
    (folder / "labels.csv").write_text(text)
    return opened(source, folder / "work", labels=str(folder / "labels.csv"), **keys)[0]


def test_labels_from_a_csv_file(tmp_path, capsys):
    text = "file,label,split,age\n0.png,tabby,train,3\n1.png,siam,val,4\n"
    listing = labelled(tmp_path, text)
    assert summary(listing) == {"0.png": ("train", "tabby"), "1.png": ("validation", "siam")}
    assert listing.items[0].extra == {"age": "3"} and len(listing.items[0].companions) == 1
    assert listing.left_out[0] == f"2.png: not in labels={tmp_path / 'labels.csv'}"
    for text, keys, want in (
        ("path,label\n0.png,5\n1.png,\n2.png,7\n", {}, [5, None, 7]),  # numbers where all are
        ("path,label\n0.png,b\n1.png, \n2.png,a\n", {}, ["b", None, "a"]),
        ("path,label\n0.png,10.0\n1.png,\n2.png,3.0\n", {}, [10, None, 3]),
        ("path,label\n0.png,1.5\n1.png,2.0\n", {}, ["1.5", "2.0"]),
        ("path,label\nbus/3.png,1\nbus/3.png,1\n3.png,2\n", {}, [1, 2]),  # a path wins
        ("path,species\n0.png,4\n", {"label_column": "species"}, [4]),
        ("path,species\n0.png,4\n", {}, [None]),
    ):
        assert [item.category for item in labelled(tmp_path, text, **keys).items] == want
    assert "hold no label or class or category: no classes" in capsys.readouterr().err


def test_wrong_csv_files_are_refused(tmp_path):
    for text, message in (
        ("a,b\n1,2\n", r"hold none of path, file"),
        ("path,label\nx.png\n", "line 2 has another number of columns"),
        ("path,age\n0.png,4\n", "hold no label; correct label_column=label"),
        ("path,label,split\n0.png,1,holdout\n", "line 2: split 'holdout' is unknown"),
        ("path,label\nx.png,1\n", r"none of the 5 pictures: it has x\.png, the source 0\.png"),
        ("path,label\n3.png,1\n", r"3\.png fits bus/3\.png and car/3\.png; name each picture by"),
        ("path,label\n0.png,1\n0.png,2\n", r"line 3: 0\.png was there with other fields"),
    ):
        with pytest.raises(ConfigError, match=message):
            labelled(tmp_path, text, label_column="label")
