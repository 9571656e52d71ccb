"""Local, uncompressed copies of shards: unpacked or fetched once, into the user's cache folder."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vlm.errors import DataError
from vlm.files import write_file

ADVICE = "; for another cache folder set VLM_CACHE=/some/folder"

BLOCK = 1 << 20
# Larger files are told apart by size and date: hashing a terabyte takes an hour.
HASHED = 256 << 20


@dataclass(frozen=True)
class LocalTar:
    """A tar that can be read at random places."""

    path: Path
    identity: str
    """Changes when the content does: names cached indexes."""

    problem: str = ""
    """What was wrong with the packed file; what could be unpacked is there."""


def cache_dir() -> Path:
    """Where unpacked shards and indexes live: $VLM_CACHE, else the platform's cache folder."""
    given = os.environ.get("VLM_CACHE")
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vlm"


def is_remote(place: str) -> bool:
    """Whether a shard is fetched by webdataset (an address or a ``pipe:`` command)."""
    return place.startswith("pipe:") or "://" in place


def local_tar(place: str) -> LocalTar:
    """The shard `place` (path, address or ``pipe:`` command) as a plain local tar.

    A plain tar is used where it is; a gzipped one is unpacked once, an address fetched once (delete the
    cache folder to fetch again). Raises DataError when it can't be read or the cache can't be written.
    """
    if is_remote(place):
        return _fetched(place)
    path = Path(place)
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        status = path.stat()
    except OSError as error:
        raise DataError(f"{place}: the shard can't be read ({error.strerror or error})") from error
    stamp = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    if not packed:
        return LocalTar(path, _digest(stamp))
    identity = _file_digest(path) if status.st_size <= HASHED else _digest(stamp)

    def unpack(target: BinaryIO) -> str:
        with path.open("rb") as file:
            return _gunzip(file, target)

    return _stored(identity, unpack, place)


def _stored(identity: str, fill: Callable[[BinaryIO], str], place: str) -> LocalTar:
    """The cached tar named by `identity`; `fill` makes it when missing and returns a problem or nothing."""
    path = cache_dir() / "shards" / f"{identity[:40]}.tar"
    note = path.with_suffix(".json")
    problem = _noted(path, note)
    if problem is None:
        problem = str(write_file(path, fill, advice=ADVICE))
        said = {"from": place, "bytes": path.stat().st_size, "problem": problem}
        content = json.dumps(said).encode("utf-8")
        write_file(note, lambda file: file.write(content), advice=ADVICE)
    return LocalTar(path, identity, problem)


def _noted(path: Path, note: Path) -> str | None:
    """What was wrong when `path` was made; None when it must be made (again)."""
    try:
        said = json.loads(note.read_text("utf-8"))
        return str(said["problem"]) if path.stat().st_size == said["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fetched(place: str) -> LocalTar:
    from webdataset.gopen import gopen

    def fetch(target: BinaryIO) -> str:
        try:
            with contextlib.closing(gopen(place, "rb")) as stream:
                head = stream.read(2)
                if not head:
                    raise DataError(f"{place}: nothing came back, expected a tar")
                source = _Joined(head, stream)
                problem = ""
                if head == b"\x1f\x8b":
                    problem = _gunzip(source, target)
                else:
                    for block in iter(lambda: source.read(BLOCK), b""):
                        target.write(block)
            target.seek(0)
            if not tarfile.is_tarfile(target):  # an error page must not stay in the cache
                raise DataError(f"{place}: what came back is not a tar archive")
            return problem
        except DataError:
            raise
        except Exception as error:  # curl's exit codes arrive as OSError, a missing handler as ValueError
            raise DataError(f"{place}: the shard can't be fetched ({error})") from error

    return _stored(_digest(place), fetch, place)


@dataclass
class _Joined:
    """A stream with its first bytes put back."""

    head: bytes
    rest: Any

    def read(self, size: int = -1) -> bytes:
        head, self.head = self.head, b""
        return head if head else self.rest.read(size)


def _gunzip(source: Any, target: BinaryIO) -> str:
    """Unpack as much as is whole; returns what was wrong, or nothing."""
    try:
        for block in _blocks(source):
            target.write(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        return f"damaged gzip ({error})"
    return ""


def _blocks(source: Any) -> Iterator[bytes]:
    # zlib hands out what it has before a damaged place; GzipFile drops the last block.
    unpacker = zlib.decompressobj(wbits=31)
    while block := source.read(BLOCK):
        while block:
            yield unpacker.decompress(block, 4 * BLOCK)  # a bounded piece: zeros pack a thousandfold
            block = unpacker.unconsumed_tail
            if unpacker.eof and unpacker.unused_data.strip(b"\0"):  # several members in one file
                block = unpacker.unused_data
                unpacker = zlib.decompressobj(wbits=31)
    if not unpacker.eof:
        yield unpacker.flush()
        raise EOFError("ends too early")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
