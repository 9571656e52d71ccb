"""Where each sample lies in a tar: one pass over it, kept in the cache; what is broken is counted."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from webdataset.tariterators import base_plus_ext

from vlm.data.cache import ADVICE, LocalTar, cache_dir
from vlm.data.images import SUFFIXES
from vlm.data.samples import DAMAGED, Problems, caption_length, parse_json, with_captions
from vlm.errors import DataError
from vlm.files import write_file

logger = logging.getLogger("vlm.data")

INDEX_VERSION = 2
MAX_JSON = 16 << 20
Piece = tuple[int, int]  # offset and size in the tar; (-1, 0) where there is none
NOTHING: Piece = (-1, 0)


@dataclass
class Index:
    """Where each whole sample of one shard lies, and what was skipped."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """key, image, json, text (pieces), length (caption characters), concept."""

    problems: Problems = field(default_factory=Problems)
    textless: bool = False
    """Whether pictures without a text are among them."""


def index_shard(tar: LocalTar, label: str, *, textless: bool = False) -> Index:
    """The index of a shard, from the cache when it is there; one sequential pass otherwise.

    label: how problems call the shard. textless: whether pictures without a text are taken too. Raises ValueError
    when the file isn't a tar at all.
    """
    stored = cache_dir() / "index" / f"{tar.identity[:40]}-{INDEX_VERSION}{'-textless' if textless else ''}.json"
    try:
        saved = json.loads(stored.read_text("utf-8"))
        return Index(saved["rows"], Problems.from_dict(saved["problems"]), textless)
    except FileNotFoundError:
        index = _scan(tar, label, textless)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.info("the index of %s is made again: %s", label, error)
        index = _scan(tar, label, textless)
    content = json.dumps({"rows": index.rows, "problems": index.problems.as_dict()}).encode("utf-8")
    try:
        write_file(stored, lambda file: file.write(content), advice=ADVICE)
    except DataError as error:
        logger.warning("the index of %s isn't kept: %s", label, error)
    return index


def _scan(tar: LocalTar, label: str, textless: bool) -> Index:
    index = Index(textless=textless)
    if tar.problem:
        index.problems.add(DAMAGED, f"{label} ({tar.problem})")
    elif not tar.path.stat().st_size:
        return index  # tarfile would call it no tar
    with tar.path.open("rb") as file:
        key = ""
        members: dict[str, Piece] = {}
        seen: set[str] = set()
        for prefix, suffix, piece in _members(file, label, index.problems):
            if prefix != key:
                _finish(file, label, key, members, index, seen)
                key, members = prefix, {}
            if suffix in members:
                index.problems.add("member twice in one sample, the first is used", f"{label}/{key}.{suffix}")
            members.setdefault(suffix, piece)
        _finish(file, label, key, members, index, seen)
    return index


def _members(file: BinaryIO, label: str, problems: Problems) -> Iterator[tuple[str, str, Piece]]:
    """Key, ending and place of each whole member, by webdataset's own rule for splitting names."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                end = member.offset_data + member.size
                if member.isreg() and end > size:
                    problems.add(DAMAGED, f"{label} (ends inside {member.name})")
                    return
                prefix, suffix = base_plus_ext(member.name.encode("utf-8", "replace").decode("utf-8"))
                if (
                    member.isreg()
                    and not member.issparse()
                    and prefix
                    and not prefix.rsplit("/", 1)[-1].startswith("__")
                ):
                    yield prefix, suffix.lower(), (member.offset_data, member.size)
            end = archive.offset  # where the next header would be
    except tarfile.ReadError as error:
        if not end:
            raise ValueError(str(error)) from error
        problems.add(DAMAGED, f"{label} ({error})")
        return
    except (tarfile.TarError, ValueError, OverflowError) as error:
        problems.add(DAMAGED, f"{label} ({error})")
        return
    # tarfile takes a damaged header and a cut at a block's edge for the end; a whole archive ends in zeros.
    file.seek(max(0, min(end, size) - 512))
    if file.read(1536).strip(b"\0") and not _ends_in_zeros(file, end):
        problems.add(DAMAGED, f"{label} (no end mark: it was cut, or damaged at byte {end:,})")


def _ends_in_zeros(file: BinaryIO, end: int) -> bool:
    for start in (end - 512, end):
        if start >= 0:
            file.seek(start)
            block = file.read(512)
            if len(block) == 512 and not block.strip(b"\0"):
                return True
    return False


def _finish(file: BinaryIO, label: str, key: str, members: dict[str, Piece], index: Index, seen: set[str]) -> None:
    """Add the sample of these members to the index and its key to `seen`, or say why it can't be used."""
    if not members:
        return
    where = f"{label}/{key}"
    if key in seen:
        index.problems.add("key of an earlier sample, the first is used", where)
        return
    seen.add(key)
    pictures = [piece for suffix, piece in members.items() if f".{suffix}" in SUFFIXES]
    described = members.get("json", NOTHING)
    text = members.get("txt", NOTHING)
    if not pictures:
        index.problems.add("no picture", where)
        return
    if described == NOTHING and text == NOTHING and not index.textless:
        index.problems.add("picture without JSON or text", where)
        return
    back = file.tell()
    try:
        meta = read_meta(
            file, described, text, textless=index.textless, report=lambda reason: index.problems.add(reason, where)
        )
    except ValueError as error:
        reason = "no caption" if str(error) == "no caption" else "JSON or text can't be read"
        index.problems.add(reason, where)
        return
    finally:
        file.seek(back)
    row = {"key": key, "image": pictures[0], "json": described, "text": text}
    index.rows.append({**row, "length": caption_length(meta), "concept": str(meta.get("concept") or "")})


def read_piece(file: BinaryIO, piece: Piece) -> bytes:
    """The bytes of a member; raises ValueError when the file ends before them."""
    file.seek(piece[0])
    content = file.read(piece[1])
    if len(content) != piece[1]:
        raise ValueError("the shard is shorter than when it was indexed")
    return content


def read_meta(
    file: BinaryIO, described: Piece, text: Piece, *, textless: bool, report: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """A sample's JSON with its captions; raises ValueError when there are none but must be, or it can't be read.

    described, text: the members ``.json`` and ``.txt``. textless, report: see `with_captions`.
    """
    if max(described[1], text[1]) > MAX_JSON:
        raise ValueError("JSON or text is too long")
    meta = parse_json(read_piece(file, described)) if described[0] >= 0 else {}
    lines = read_piece(file, text).decode("utf-8-sig").splitlines() if text[0] >= 0 else []
    return with_captions(meta, lines, textless=textless, report=report)
