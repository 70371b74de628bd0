"""Plain tars, read by position: the headers of a shard, and the members of a piece of it.

In: a tar without compression. Out: where samples begin, or names and contents of files.
Unlike `tarfile`, a damaged header is an error and not the end. What a header says is compared with
the bytes that are there before it is believed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from vae_dist.config.errors import ConfigError

BLOCK = 512  # bytes; headers and data begin at multiples of it
PAX = b"x"  # type of members that say more of the next one, as do those of NAMES
NAMES = {b"L": b"path", b"K": b"linkpath"}  # GNU's, and pax's words for them
SPECIAL = (PAX, *NAMES, b"g")
MAX_SPECIAL = 1 << 20  # bytes of one of these
REGULAR = (b"0", b"\0")
LINKS = (HARD_LINK, SYMBOLIC_LINK) = (b"1", b"2")
FOLDER, SPARSE = b"5", b"S"
METADATA = re.compile(r"__[^/]*__($|/)")  # names that webdataset leaves out (`skip_meta`)


class ShardError(ConfigError):
    """A shard cannot be read as its index says; the message names shard, byte and remedy."""


class DamagedSampleError(ValueError):
    """One sample cannot be read; the message is the reason."""


class _DamagedTarError(DamagedSampleError):
    def __init__(self, reason: str, at: int) -> None:
        super().__init__(reason)
        self.at = at


class Source(NamedTuple):
    """A tar that is open. read: (first byte, number) -> bytes, fewer at the end; size in bytes, or
    None where only reading to the end tells."""

    read: Callable[[int, int], bytes]
    size: int | None


class Member(NamedTuple):
    name: str
    kind: bytes
    begin: int  # of its first header
    start: int  # of its data
    size: int  # bytes of data
    stop: int  # where the next header begins
    target: str  # of a link


class PassedOver(NamedTuple):
    """What a tar holds beside regular files."""

    name: str
    target: str  # the member that a link means; empty: no link
    reason: str  # why it cannot be read by itself


def members(data: bytes | memoryview) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files in the bytes of one or more samples.

    Raises DamagedSampleError at a damaged header and where the bytes end too early. A header of
    zeros is a damaged one: the bytes of samples hold no end mark.
    """
    data = bytes(data)
    source = Source(lambda at, count: data[at : at + count], len(data))
    for member in _walk(source, is_whole=False):
        if member.kind in REGULAR:
            yield member.name, data[member.start : member.start + member.size]


def sample_starts(path: str, source: Source | None = None) -> tuple[list[int], int]:
    """Byte offsets at which the samples of a shard begin, and the end of the last one.

    A sample is a run of files with one basename, after webdataset's rule. source: what reads a
    shard that is no local file. Raises ShardError, also where the members of a sample do not lie
    together.
    """
    starts: list[int] = []
    suffixes: dict[int, set[str]] = {}  # by hash of the key
    last, end = None, 0
    for member in _members_of_shard(path, source=source):
        key, suffix = _key_and_suffix(member)
        if key is None:
            continue
        known = suffixes.setdefault(hash(key), set())
        if key != last:
            if known and suffix not in known:
                raise ShardError(
                    f"{path}: byte {member.begin}: the members of sample {key} do not lie "
                    f"together; `python -m vae_dist.pack source={path} out=FOLDER` writes shards "
                    "in which they do"
                )
            starts.append(member.begin)
        known.add(suffix)
        last, end = key, member.stop
    return starts, end


def end_of_samples(path: str, end: int) -> bool:
    """Whether a shard's samples end at byte `end`, as its index says: at a border, none after."""
    try:
        rest = map(_key_and_suffix, _members_of_shard(path, end))
        return end % BLOCK == 0 and all(key is None for key, _ in rest)
    except ShardError:
        return False


def files_of_tar(
    path: str, passed: list[PassedOver] | None = None
) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, bytes) of the regular files of a plain tar; `passed` takes what is none,
    and what follows the end mark. Raises ShardError."""
    end = 0
    for member in _members_of_shard(path):
        end = member.stop
        if member.kind in REGULAR:
            yield member.name, member.start, member.size
        elif passed is not None and member.kind != FOLDER:
            passed.append(_passed_over(member))
    if passed is not None:
        with open(path, "rb") as file:
            file.seek(end + 2 * BLOCK)
            if any(any(piece) for piece in iter(lambda: file.read(1 << 20), b"")):
                reason = f"more follows its end mark at byte {end}; join with tar --concatenate"
                passed.append(PassedOver("", "", reason))


def _passed_over(member: Member) -> PassedOver:
    name, target = member.name, member.target
    if member.kind not in LINKS:
        return PassedOver(
            name, "", f"a member of type {member.kind.decode('latin1')!r}, no regular file"
        )
    if member.kind == SYMBOLIC_LINK:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    return PassedOver(name, target, f"a link to {target}, which is not in the tar")


def is_metadata(name: str) -> bool:
    """Whether a file of that name belongs to no sample, after webdataset's rule."""
    return METADATA.match(name) is not None


def key_and_suffix(name: str) -> tuple[str | None, str]:
    """webdataset's rule, `base_plus_ext`: the suffix begins at the first dot of the last part."""
    last = name.rfind("/") + 1
    dot = name.find(".", last)
    if dot > last:
        return name[:dot], name[dot + 1 :]
    key, suffix = base_plus_ext(name)  # no dot, or one in front: rare, and its own affair
    return key, suffix or ""


def _key_and_suffix(member: Member) -> tuple[str | None, str]:
    is_of_sample = member.kind in REGULAR and not is_metadata(member.name)
    return key_and_suffix(member.name) if is_of_sample else (None, "")


def _members_of_shard(path: str, at: int = 0, source: Source | None = None) -> Iterator[Member]:
    """All members of a shard from byte `at` on. Raises ShardError."""
    with contextlib.nullcontext(source) if source else opened(path) as file:
        try:
            yield from _walk(file, at, is_whole=True)
        except _DamagedTarError as error:
            remedy = "copy the shard again, or take it out of the data set"
            raise ShardError(f"{path}: byte {error.at}: {error}; {remedy}") from None


@contextlib.contextmanager
def opened(path: str) -> Iterator[Source]:
    """A plain local file. Raises OSError; a FIFO or a device is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no plain file", path)
        yield Source(lambda at, count: os.pread(descriptor, count, at), status.st_size)
    finally:
        os.close(descriptor)


def _walk(source: Source, at: int = 0, *, is_whole: bool) -> Iterator[Member]:
    """The members from byte `at` on, by hops from header to header, up to the end mark of a whole
    tar, else to the end of the bytes."""
    read, size = source
    begin, facts = at, dict[bytes, bytes]()
    while is_whole or size is None or at < size:
        block = read(at, BLOCK)
        if is_whole and not block:
            raise _DamagedTarError("the tar ends without its end mark, it is cut off", at)
        if is_whole and len(block) == BLOCK and not any(block):
            if any(read(at + BLOCK, BLOCK)):  # an end mark is two blocks, or the last one
                raise _DamagedTarError("a block of zeros where a header should be", at)
            return
        member = _parsed(block, at, begin, facts)
        end = member.start + member.size
        if member.size and not (read(end - 1, 1) if size is None else end <= size):
            raise _DamagedTarError("the tar ends inside a file, it is cut off", at)
        if member.kind in SPECIAL:
            if member.size > MAX_SPECIAL:
                raise _DamagedTarError(f"a name or an attribute of {member.size} bytes", at)
            facts = facts | _facts(member.kind, read(member.start, member.size), at)
        else:
            yield member
            begin, facts = member.stop, {}
        at = member.stop


def _parsed(block: bytes, at: int, begin: int, facts: dict[bytes, bytes]) -> Member:
    """The member of the header in 512 bytes, after what special members before it say."""
    if len(block) < BLOCK:
        raise _DamagedTarError("the tar ends inside a header", at)
    kind, field = block[156:157], block[124:136]
    try:
        # adler32's low half is the sum of all bytes mod 65521, here with blanks for its own eight
        total = zlib.adler32(block[:148] + b" " * 8 + block[156:], 0) & 0xFFFF
        is_damaged = total != int(block[148:156].rstrip(b" \0"), 8) % 65521
        # GNU tar writes sizes from 8 GiB on in base 256, marked by the first bit
        size = int.from_bytes(field[1:], "big") if field[0] == 128 else int(field.rstrip(b" \0"), 8)
        if facts and kind not in SPECIAL:
            size = int(facts.get(b"size", size))
    except ValueError:
        is_damaged = True
    if is_damaged or size < 0:  # int() reads a sign; going back in the file would have no end
        raise _DamagedTarError("damaged tar header", at)
    name, target = block[:100].split(b"\0", 1)[0], b""
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    if kind in LINKS:
        target = facts.get(b"linkpath", block[157:257].split(b"\0", 1)[0])
    if facts:
        name = facts.get(b"path", name)
        if kind in REGULAR and any(key.startswith(b"GNU.sparse") for key in facts):
            kind = SPARSE
    stop = at + BLOCK + -(-size // BLOCK) * BLOCK
    return Member(_decoded(name), kind, begin, at + BLOCK, size, stop, _decoded(target))


def _facts(kind: bytes, content: bytes, at: int) -> dict[bytes, bytes]:
    """What a special member says of the next one, by pax's words."""
    is_given, content = bool(content), content.rstrip(b"\0")
    if kind in (PAX, *NAMES) and is_given and not content:
        raise _DamagedTarError("a name or an attribute of zeros", at)
    if kind in NAMES:
        return {NAMES[kind]: content}
    found: dict[bytes, bytes] = {}
    start, end = 0, len(content) if kind == PAX else 0
    while start < end:  # records: "LENGTH KEY=VALUE\n"
        length = content[start : start + 20].partition(b" ")[0]
        stop = start + int(length) if length.isdigit() else 0
        if stop <= start + len(length) or content[stop - 1 : stop] != b"\n":
            raise _DamagedTarError("damaged pax header", at)
        key, _, value = content[start + len(length) + 1 : stop - 1].partition(b"=")
        found[key], start = value, stop
    return found


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
