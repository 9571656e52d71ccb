"""WebDataset tar shards: indexed once, then read at random; and their writer."""

from __future__ import annotations

import glob
import gzip
import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext

from vlm.data.cache import LocalTar, cache_dir, is_remote, local_tar, write_atomically
from vlm.data.images import SUFFIXES
from vlm.data.samples import Problems, Sample, caption_length, fingerprint, parse_json, with_captions
from vlm.errors import DataError

logger = logging.getLogger("vlm.data")

INDEX_VERSION = 2
ENDINGS = (".tar", ".tar.gz", ".tgz")
MAX_JSON = 16 << 20
Piece = tuple[int, int]  # offset and size in the tar; (-1, 0) where there is none
NOTHING: Piece = (-1, 0)


@dataclass
class Index:
    """Where each whole sample of one shard lies, and what was skipped."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """key, image, json, text (pieces), length (caption characters), concept."""

    problems: Problems = field(default_factory=Problems)


class ShardSource:
    """Samples of tar shards by number, in the order of the shards."""

    def __init__(self, places: list[str], *, name: str = "") -> None:
        """places: paths, addresses or ``pipe:`` commands, each a shard. Raises DataError if all are empty."""
        self.name = name or ", ".join(places)
        self.places = places
        self.problems = Problems()
        self.keys: list[str] = []
        self.concepts: list[str] = []
        self._paths: list[Path] = []
        lengths: list[int] = []
        pieces: list[tuple[int, ...]] = []
        for number, place in enumerate(places):
            tar, label = local_tar(place), shard_label(place)
            index = index_shard(tar, label)
            self._paths.append(tar.path)
            self.problems.merge(index.problems)
            for row in index.rows:
                self.keys.append(row["key"])
                self.concepts.append(row["concept"] or f"{label}:{row['key']}")
                lengths.append(row["length"])
                pieces.append((number, *row["image"], *row["json"], *row["text"]))
        self.lengths = np.array(lengths, dtype=np.int32)
        self._pieces = np.array(pieces, dtype=np.int64).reshape(-1, 7)
        self.problems.log(self.name)
        if not self.keys:
            found = f" ({self.problems.summary()})" if self.problems.total else ""
            raise DataError(f"{self.name}: no samples in these shards{found}")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Sample:
        """The sample; raises DataError when the shard has changed or gone since it was indexed."""
        shard, image_at, image_size, *rest = self._pieces[number].tolist()
        key = self.keys[number]
        try:
            with self._paths[shard].open("rb") as file:
                image = _read_piece(file, (image_at, image_size))
                meta = _read_meta(file, (rest[0], rest[1]), (rest[2], rest[3]))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.places[shard]}: sample {key} can't be read ({error})") from error
        return Sample(key, image, meta)

    def meta(self, number: int) -> dict[str, Any]:
        """The JSON of a sample without its picture."""
        shard, _, _, *rest = self._pieces[number].tolist()
        try:
            with self._paths[shard].open("rb") as file:
                return _read_meta(file, (rest[0], rest[1]), (rest[2], rest[3]))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.places[shard]}: {self.keys[number]} can't be read ({error})") from error

    def fingerprint(self) -> str:
        """Hash of the keys, concepts, caption lengths and picture sizes: the same wherever the shards lie."""
        return fingerprint(self.keys, self.concepts, self.lengths, self._pieces[:, 2])


def find_shards(pattern: str) -> list[str]:
    """The shards of a path, folder, glob, brace pattern (``{00..12}``), address or ``pipe:`` command, sorted.

    Raises DataError when there are none.
    """
    from webdataset.shardlists import expand_urls

    if pattern.startswith("pipe:"):
        return [pattern]
    try:
        braces = "{" in pattern and not Path(pattern).exists()
        expanded = expand_urls(pattern) if braces else [pattern]
    except ValueError as error:
        raise DataError(f"{pattern}: the braces can't be read ({error}), expected {{00000..00012}}") from error
    found: list[str] = []
    for place in expanded:
        if is_remote(place):
            found.append(place)
        elif Path(place).is_dir():
            found += sorted(str(path) for path in Path(place).iterdir() if path.name.endswith(ENDINGS))
        elif glob.has_magic(place) and not Path(place).exists():
            found += sorted(glob.glob(place, recursive=True))
        elif Path(place).is_file():
            found.append(place)
        else:
            raise DataError(f"{place}: no such shard")
    if not found:
        raise DataError(f"{pattern}: no shards ({', '.join(ENDINGS)}) there")
    return found


def shard_label(place: str) -> str:
    """The shard's file name without folder and ending."""
    label = place.rstrip("/").rsplit("/", 1)[-1]
    for ending in (".tar.gz", ".tgz", ".tar"):
        label = label.removesuffix(ending)
    return label


def index_shard(tar: LocalTar, label: str) -> Index:
    """The index of a shard, from the cache when it is there; one sequential pass otherwise.

    label: how problems call the shard. Raises DataError when the file isn't a tar at all.
    """
    stored = cache_dir() / "index" / f"{tar.identity[:40]}-{INDEX_VERSION}.json"
    try:
        saved = json.loads(stored.read_text("utf-8"))
        return Index(saved["rows"], Problems.from_dict(saved["problems"]))
    except FileNotFoundError:
        index = _scan(tar, label)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.info("the index of %s is made again: %s", label, error)
        index = _scan(tar, label)
    content = json.dumps({"rows": index.rows, "problems": index.problems.as_dict()}).encode("utf-8")
    try:
        write_atomically(stored, lambda file: file.write(content))
    except DataError as error:
        logger.warning("the index of %s isn't kept: %s", label, error)
    return index


def _stored_index(path: Path) -> Index | None:
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text("utf-8"))
        return Index(saved["rows"], Problems.from_dict(saved["problems"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.info("%s is made anew (%s)", path, error)
        return None


def _scan(tar: LocalTar, label: str) -> Index:
    index = Index()
    if tar.problem:
        index.problems.add("damaged shard, its readable part is used", f"{label} ({tar.problem})")
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
    damaged, end = "damaged shard, its readable part is used", 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                end = member.offset_data + member.size
                if member.isreg() and end > size:
                    problems.add(damaged, f"{label} (ends inside {member.name})")
                    return
                prefix, suffix = base_plus_ext(member.name.encode("utf-8", "replace").decode("utf-8"))
                if member.isreg() and prefix and not prefix.rsplit("/", 1)[-1].startswith("__"):
                    yield prefix, suffix.lower(), (member.offset_data, member.size)
            end = archive.offset  # where the next header would be
    except tarfile.ReadError as error:
        if not end:
            raise DataError(f"{label}: not a tar archive, or its first bytes are damaged ({error})") from error
        problems.add(damaged, f"{label} ({error})")
        return
    except (tarfile.TarError, ValueError, OverflowError) as error:
        problems.add(damaged, f"{label} ({error})")
        return
    # tarfile takes a damaged header and a cut at a block's edge for the end; a whole archive ends in zeros.
    file.seek(max(0, min(end, size) - 512))
    if file.read(1536).strip(b"\0") and not _ends_in_zeros(file, end):
        problems.add(damaged, f"{label} (no end mark: it was cut, or damaged at byte {end:,})")


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
    if described == NOTHING and text == NOTHING:
        index.problems.add("picture without JSON or text", where)
        return
    back = file.tell()
    try:
        meta = _read_meta(file, described, text, report=lambda reason: index.problems.add(reason, where))
    except ValueError as error:
        reason = "no caption" if str(error) == "no caption" else "JSON or text can't be read"
        index.problems.add(reason, where)
        return
    finally:
        file.seek(back)
    row = {"key": key, "image": pictures[0], "json": described, "text": text}
    index.rows.append({**row, "length": caption_length(meta), "concept": str(meta.get("concept") or "")})


def _read_piece(file: BinaryIO, piece: Piece) -> bytes:
    file.seek(piece[0])
    content = file.read(piece[1])
    if len(content) != piece[1]:
        raise ValueError("the shard is shorter than when it was indexed")
    return content


def _read_meta(
    file: BinaryIO, described: Piece, text: Piece, report: Callable[[str], None] | None = None
) -> dict[str, Any]:
    if max(described[1], text[1]) > MAX_JSON:
        raise ValueError("JSON or text is too long")
    meta = parse_json(_read_piece(file, described)) if described[0] >= 0 else {}
    lines = _read_piece(file, text).decode("utf-8-sig").splitlines() if text[0] >= 0 else []
    return with_captions(meta, lines, report=report)


class ShardWriter:
    """Writes shards that appear under their names only when they are whole.

    ``with ShardWriter("out/train-{:05d}.tar") as writer: writer.write("cat-1", content, "webp", {...})``
    The same samples give the same bytes: no dates, no owners. Use as a context manager; on an error the
    shard being written is dropped.
    """

    def __init__(self, pattern: str, *, samples: int = 2000) -> None:
        """pattern: path with a format field for the number, ending in .tar or .tar.gz. samples: per shard."""
        try:
            numbered = pattern.endswith((".tar", ".tar.gz")) and pattern.format(0) != pattern.format(1)
        except (ValueError, LookupError):
            numbered = False
        if not numbered:
            raise DataError(f"{pattern}: expected a shard name with a number, such as train-{{:05d}}.tar")
        if samples < 1:
            raise DataError(f"a shard holds at least 1 sample, got {samples}")
        self.pattern, self.samples = pattern, samples
        self.shards: list[Path] = []
        self._rows: list[tuple[str, bytes]] = []
        self._keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()

    def write(self, key: str, image: bytes, suffix: str, meta: dict[str, Any]) -> None:
        """Add one sample. Raises DataError when the key, the suffix or the captions can't be read back."""
        suffix = suffix.lstrip(".").lower()
        if base_plus_ext(f"{key}.{suffix}") != (key, suffix) or key.startswith(("__", "/")):
            raise DataError(f"sample key {key!r} must be a name without dots")
        if f".{suffix}" not in SUFFIXES:
            raise DataError(f"sample {key}: {suffix!r} is not a picture's ending")
        if key in self._keys:
            raise DataError(f"sample {key}: this key is in the shard already")
        try:
            with_captions(meta)
            content = json.dumps(meta, ensure_ascii=False, sort_keys=True).encode("utf-8")
        except (ValueError, TypeError) as error:
            raise DataError(f"sample {key}: {error}") from error
        self._rows += [(f"{key}.{suffix}", image), (f"{key}.json", content)]
        self._keys.add(key)
        if len(self._keys) == self.samples:
            self._flush()

    def close(self) -> None:
        """Write the last shard."""
        if self._rows:
            self._flush()

    def _flush(self) -> None:
        path = Path(self.pattern.format(len(self.shards)))
        rows = self._rows

        def fill(file: BinaryIO) -> None:
            packed = path.name.endswith(".gz")
            target: Any = gzip.GzipFile("", "wb", 9, file, mtime=0) if packed else file
            with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as archive:
                for name, content in rows:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
            if packed:
                target.close()

        write_atomically(path, fill)
        self.shards.append(path)
        self._rows, self._keys = [], set()
