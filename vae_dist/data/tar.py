"""Plain tars, read by position: the headers of a shard, and the members of a piece of it.

In: a tar without compression. Out: where samples begin, or names and contents of files.
Unlike `tarfile`, a damaged header is an error and not the end.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from vae_dist.config.errors import ConfigError

Read = Callable[[int, int], bytes]  # (first byte, number) -> bytes; fewer at the end

BLOCK = 512  # bytes; headers and data begin at multiples of it
ADLER_MODULUS = 65521
MAX_CHECKSUM = 255 * 504 + 8 * ord(" ")
LONG_NAME, PAX = b"L", b"x"  # types of members that carry the name of the next one
SPECIAL = (LONG_NAME, PAX, b"K", b"g")
REGULAR = (b"0", b"\0")
HARD_LINK, SYMBOLIC_LINK, FOLDER = b"1", b"2", b"5"
REST_BYTES = 1 << 20  # that are read at once behind the end mark
METADATA = re.compile(r"__[^/]*__($|/)")  # names that webdataset leaves out (`skip_meta`)
_PAX_PATH = re.compile(rb"\d+ path=([^\n]*)\n")


class ShardError(ConfigError):
    """A shard cannot be read as its index says; the message names shard, byte and remedy."""


class DamagedSampleError(ValueError):
    """One sample cannot be read; the message is the reason."""


class PassedOver(NamedTuple):
    """What a tar holds beside regular files."""

    name: str
    target: str  # the member that a link means; empty: no link
    reason: str  # why it cannot be read by itself


class Header(NamedTuple):
    name: bytes
    size: int  # bytes of data
    kind: bytes


def parse_header(block: bytes) -> Header:
    """The header in 512 bytes. Raises DamagedSampleError when checksum or size is wrong."""
    if len(block) < BLOCK:
        raise DamagedSampleError("the tar ends inside a header")
    try:
        checksum = int(block[148:156].rstrip(b" \0"), 8)
        field = block[124:136]
        # GNU tar writes sizes from 8 GiB on in base 256, marked by the first bit
        size = int.from_bytes(field[1:], "big") if field[0] & 128 else int(field.rstrip(b" \0"), 8)
    except ValueError:
        raise DamagedSampleError("damaged tar header") from None
    if size < 0:  # int() reads a sign; going back in the file would have no end
        raise DamagedSampleError("damaged tar header")
    # the sum of all bytes, with blanks for its own eight; adler32 starts at 1 and takes it modulo
    rest = zlib.adler32(block[156:], zlib.adler32(block[:148])) & 0xFFFF
    if (rest - 1 + 8 * ord(" ") - checksum) % ADLER_MODULUS or checksum > MAX_CHECKSUM:
        raise DamagedSampleError("damaged tar header")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return Header(name, size, block[156:157])


def members(data: bytes | memoryview) -> Iterator[tuple[str, memoryview]]:
    """Name and content, not copied, of the regular files in the bytes of one or more samples.

    Raises DamagedSampleError at a damaged header and where the bytes end too early. A header of
    zeros is a damaged one: the bytes of samples hold no end mark.
    """
    data = memoryview(data)
    at, long_name = 0, None
    while at < len(data):
        header = parse_header(bytes(data[at : at + BLOCK]))
        content = data[at + BLOCK : at + BLOCK + header.size]
        if len(content) < header.size:
            raise DamagedSampleError("the tar ends inside a file")
        at += BLOCK + _padded(header.size)
        if header.kind in SPECIAL:
            long_name = _long_name(header.kind, bytes(content)) or long_name
            continue
        if header.kind in REGULAR:
            yield _decoded(long_name or header.name), content
        long_name = None


def sample_starts(path: str, read: Read | None = None) -> tuple[list[int], int]:
    """Byte offsets at which the samples of a shard begin, and the end of the last one.

    A sample is a run of files with one basename, after webdataset's rule. Raises ShardError.
    """
    starts: list[int] = []
    key, end = None, 0
    for start, stop, name, _, _ in _hops(path, 0, read):
        sample_key = _sample_key(name)
        if sample_key is not None:
            if sample_key != key:
                starts.append(start)
            key, end = sample_key, stop
    return starts, end


def end_of_samples(path: str, end: int) -> bool:
    """Whether a shard's samples end at byte `end`, as its index says: at a border, none after."""
    if end % BLOCK or end > os.path.getsize(path):
        return False
    try:
        return all(_sample_key(name) is None for _, _, name, _, _ in _hops(path, end))
    except ShardError:
        return False


def _sample_key(name: bytes) -> str | None:
    text = _decoded(name)
    return None if is_metadata(text) else key_and_suffix(text)[0]


def is_metadata(name: str) -> bool:
    """Whether a file of that name belongs to no sample, after webdataset's rule."""
    return name.startswith("__") and METADATA.match(name) is not None


def key_and_suffix(name: str) -> tuple[str | None, str]:
    """webdataset's rule, `base_plus_ext`: the suffix begins at the first dot of the last part."""
    last = name.rfind("/") + 1
    dot = name.find(".", last)
    if dot > last:
        return name[:dot], name[dot + 1 :]
    key, suffix = base_plus_ext(name)  # no dot, or one in front: rare, and its own affair
    return key, suffix or ""


def files_of_tar(
    path: str, passed: list[PassedOver] | None = None
) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, bytes) of the regular files of a plain tar; `passed` takes what is none.
    Raises ShardError."""
    for _, _, name, at, size in _hops(path, 0, passed=passed):
        yield _decoded(name), at, size


def _passed_over(name: str, kind: bytes, block: bytes) -> PassedOver:
    target = _decoded(block[157:257].split(b"\0", 1)[0])
    if kind == SYMBOLIC_LINK:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    elif kind != HARD_LINK:
        return PassedOver(name, "", f"a member of type {kind.decode('latin1')!r}, no regular file")
    return PassedOver(name, target, f"a link to {target}, which is not in the tar")


def _hops(
    path: str, at: int, read: Read | None = None, passed: list[PassedOver] | None = None
) -> Iterator[tuple[int, int, bytes, int, int]]:
    """The regular files: first byte with its long name, byte after the padded data, name, first
    byte of the data, bytes of data. `read` is what reads a shard that is no local file; `passed`
    takes the other members, and what follows the end mark."""
    with contextlib.ExitStack() as opened:
        if read is None:
            descriptor = os.open(path, os.O_RDONLY)
            opened.callback(os.close, descriptor)

            def read(at: int, count: int) -> bytes:
                return os.pread(descriptor, count, at)

        start, long_name = at, None
        while True:
            block = read(at, BLOCK)
            if len(block) == BLOCK and not any(block):
                if any(read(at + BLOCK, BLOCK)):  # an end mark is two blocks, or the last one
                    raise _shard_error(path, at, "a block of zeros where a header should be")
                if passed is not None and _goes_on(read, at + 2 * BLOCK):
                    more = f"more follows its end mark at byte {at}; join with tar --concatenate"
                    passed.append(PassedOver("", "", more))
                return
            if not block:
                raise _shard_error(path, at, "the tar ends without its end mark, it is cut off")
            try:
                header = parse_header(block)
            except DamagedSampleError as error:
                raise _shard_error(path, at, str(error)) from None
            stop = at + BLOCK + _padded(header.size)
            if header.size and not read(at + BLOCK + header.size - 1, 1):
                raise _shard_error(path, at, "the tar ends inside a file, it is cut off")
            if header.kind in SPECIAL:
                content = read(at + BLOCK, header.size)
                long_name = _long_name(header.kind, content) or long_name
            else:
                if header.kind in REGULAR:
                    yield start, stop, long_name or header.name, at + BLOCK, header.size
                elif passed is not None and header.kind != FOLDER:
                    name = _decoded(long_name or header.name)
                    passed.append(_passed_over(name, header.kind, block))
                start, long_name = stop, None
            at = stop


def _goes_on(read: Read, at: int) -> bool:
    """Whether a byte from there on is not zero."""
    while piece := read(at, REST_BYTES):
        if any(piece):
            return True
        at += len(piece)
    return False


def _shard_error(path: str, at: int, reason: str) -> ShardError:
    return ShardError(
        f"{path}: byte {at}: {reason}; copy the shard again, or take it out of the data set"
    )


def _long_name(kind: bytes, content: bytes) -> bytes | None:
    if kind == LONG_NAME:
        return content.rstrip(b"\0")
    found = _PAX_PATH.findall(content) if kind == PAX else []
    return found[-1] if found else None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
