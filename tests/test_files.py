"""Readers of small files that others may have written, and texts that are safe to print or keep."""

import os
from unittest.mock import Mock

import pytest

from vae_dist.files import printable, read_bounded, read_json, redacted, write_durably


def test_bounded_read_takes_plain_files_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    assert read_bounded(path, 5) == read_bounded(tmp_path / "link", 5) == b"12345"
    os.mkfifo(tmp_path / "fifo")
    for name, limit, reason in (("file", 4, "larger than the 4"), ("fifo", 9, "no plain file")):
        with pytest.raises(ValueError, match=f"{name}: {reason}"):
            read_bounded(tmp_path / name, limit)
    with pytest.raises(OSError, match="absent"):
        read_bounded(tmp_path / "absent", 9)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_durably(tmp_path / "file", b"before")
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_durably(tmp_path / "file", [b"after", b"that"])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_json_of_a_file_or_bytes(tmp_path):
    path = tmp_path / "some.json"
    for data, reason in (
        (b"", "no JSON"),
        (b"\xff\xfe\xfa{}", "no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no JSON"),
        (b"[" * 50_000, "no JSON"),
        (b"[1]", "holds a list, not a dict"),
        (b'{"a": "' + b"x" * 100_000 + b'"}', "larger than the 100000 bytes"),
    ):
        path.write_bytes(data)
        for source in (path, data):
            with pytest.raises(ValueError, match=f"some.json: {reason}"):
                read_json(source, 100_000, name="some.json")
    path.write_text('{"a": [1, null, "\u00e9"]}', "utf-8")
    assert read_json(path, 99) == read_json(path.read_bytes(), 99) == {"a": [1, None, "\u00e9"]}


def test_what_does_not_show_is_escaped():
    for text, shown in (
        ("a name with \u00e9, \u6f22 and 'quotes'", "a name with \u00e9, \u6f22 and 'quotes'"),
        ("two\nlines\r\tand\x00", r"two\nlines\r\tand\x00"),
        ("\x1b[31mred\x9b0m", r"\x1b[31mred\x9b0m"),
        ("a\u202egnp.exe\u2066\u200b\u2028", r"a\u202egnp.exe\u2066\u200b\u2028"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\udce9.png"),
    ):
        assert printable(text) == shown


def test_redacted_takes_secrets_out_of_addresses():
    for text, shown in (
        ("https://me:pa@ss@host:80/a.tar", "https://...@host:80/a.tar"),
        ("read s3://token@bucket/a, then b", "read s3://...@bucket/a, then b"),
        ("s3://bucket/a@2.tar", "s3://bucket/a@2.tar"),
        ("http://host/a.tar?download=true", "http://host/a.tar?download=true"),
        ("http://h/{0..9}.tar?sv=1&sig=ab%2B; gone", "http://h/{0..9}.tar?... gone"),
        ("'https://h/a?X-Amz-Signature=1' is", "'https://h/a?...' is"),
        ("https://h/a?x=" + "0123456789abcdef" * 2, "https://h/a?..."),
        ("https://h/a#access_token=1", "https://h/a#..."),
        ("data.train=pipe:ssh host cat a.tar", "data.train=pipe:..."),
        ("pipe:curl -u me:pw x\nnext line", "pipe:...\nnext line"),
        ("data='pipe:curl \"x\"' ended early", "data='pipe:...' ended early"),
        ('["pipe:cat a", "b"]', '["pipe:...", "b"]'),
        ("'pipe:cat a b': no file; pipe:... is gone", "'pipe:...': no file; pipe:... is gone"),
        ("read 'pipe:curl -sf s3://u:p@h/x'", "read 'pipe:curl -sf s3://...@h/x'"),
        ("bagpipe:tune and pipe: prose", "bagpipe:tune and pipe: prose"),
        ("WANDB_API_KEY=12 hf_token=ab cd", "WANDB_API_KEY=... hf_token=... cd"),
        ("label_key=cls training.steps=3", "label_key=cls training.steps=3"),
        ({"a": ["ftp://u:p@h", 1, None]}, {"a": ["ftp://...@h", 1, None]}),
    ):
        assert redacted(text) == redacted(redacted(text)) == shown
