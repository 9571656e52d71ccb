"""WebDataset tar shards: indexed once, then read at random; and their writer.

The `webdataset` library says which members make a sample, expands brace lists and opens addresses. Its reader is
a stream, in which a sample has no number; here an index gives each one, since exactly one showing per epoch for
any ranks x workers, a resume at any sample, and batches by caption length all need numbers.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext

from vlm.data.cache import is_remote, local_tar
from vlm.data.images import SUFFIXES
from vlm.data.samples import EMPTY, OWN, Problems, Sample, fingerprint, with_captions
from vlm.data.tar_index import index_shard, read_meta, read_piece
from vlm.errors import DataError
from vlm.files import write_file

ENDINGS = (".tar", ".tar.gz", ".tgz")


class ShardSource:
    """Samples of tar shards by number, in the order of the shards."""

    def __init__(self, places: list[str], *, name: str = "", textless: bool = False) -> None:
        """places: paths, addresses or ``pipe:`` commands, each a shard. textless: whether pictures without a text are
        taken too. An empty one is told among the problems; raises DataError, of reason `EMPTY`, if all are empty.
        """
        self.name = name or ", ".join(places)
        self.places = places
        self.problems = Problems()
        self.textless = textless
        self.keys: list[str] = []
        self.concepts: list[str] = []
        self._paths: list[Path] = []
        lengths: list[int] = []
        pieces: list[tuple[int, ...]] = []
        for number, place in enumerate(places):
            tar, label = local_tar(place), shard_label(place)
            try:
                index = index_shard(tar, label, textless=textless)
            except ValueError as error:
                raise DataError(f"{place}: not a tar archive, or its first bytes are damaged ({error})") from error
            self._paths.append(tar.path)
            self.problems.merge(index.problems)
            if not index.rows and not index.problems.total:
                self.problems.add(EMPTY, label)
            for row in index.rows:
                self.keys.append(row["key"])
                self.concepts.append(row["concept"] or f"{OWN}{number}:{label}:{row['key']}")
                lengths.append(row["length"])
                pieces.append((number, *row["image"], *row["json"], *row["text"]))
        self.lengths = np.array(lengths, dtype=np.int32)
        self._pieces = np.array(pieces, dtype=np.int64).reshape(-1, 7)
        self.problems.log(self.name)
        if not self.keys:
            found = f" ({self.problems.summary()})" if self.problems.total else ""
            only = EMPTY if set(self.problems.counts) <= {EMPTY} else ""  # what is lost by damage isn't passed over
            raise DataError(f"{self.name}: no samples in these shards{found}", reason=only)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Sample:
        """The sample; raises DataError when the shard has changed or gone since it was indexed."""
        shard, image_at, image_size, *rest = self._pieces[number].tolist()
        key = self.keys[number]
        try:
            with self._paths[shard].open("rb") as file:
                image = read_piece(file, (image_at, image_size))
                meta = read_meta(file, (rest[0], rest[1]), (rest[2], rest[3]), textless=self.textless)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.places[shard]}: sample {key} can't be read ({error})") from error
        return Sample(key, image, meta)

    def meta(self, number: int) -> dict[str, Any]:
        """The JSON of a sample without its picture."""
        shard, _, _, *rest = self._pieces[number].tolist()
        try:
            with self._paths[shard].open("rb") as file:
                return read_meta(file, (rest[0], rest[1]), (rest[2], rest[3]), textless=self.textless)
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


@dataclass(frozen=True)
class ShardPicture:
    """A picture in a shard, with or without a text; read when asked for, like an open file."""

    name: str
    """The shard's place, a colon, and the member's name."""
    tar: Path
    at: int
    size: int

    def read(self, size: int = -1) -> bytes:
        """The encoded picture, or its first `size` bytes."""
        with self.tar.open("rb") as file:
            file.seek(self.at)
            return file.read(self.size if size < 0 else min(size, self.size))


def shard_pictures(place: str) -> list[ShardPicture]:
    """All pictures of a shard in their order, also those without a text. Raises DataError for what is no tar."""
    local = local_tar(place).path
    if local.is_file() and not local.stat().st_size:
        return []  # as where shards are read for training
    try:
        with tarfile.open(local, "r:") as tar:
            members = [one for one in tar if one.isfile() and Path(one.name).suffix.lower() in SUFFIXES]
    except tarfile.TarError as error:
        raise DataError(f"{place}: not a tar archive, or damaged ({error})") from error
    return [ShardPicture(f"{place}:{one.name}", local, one.offset_data, one.size) for one in members]


def shard_label(place: str) -> str:
    """The shard's file name without folder and ending."""
    label = place.rstrip("/").rsplit("/", 1)[-1]
    for ending in (".tar.gz", ".tgz", ".tar"):
        label = label.removesuffix(ending)
    return label


class ShardWriter:
    """Writes shards that appear under their names only when they are whole.

    ``with ShardWriter("out/train-{:05d}.tar") as writer: writer.write("cat-1", content, "webp", {...})``
    The same samples give the same bytes: no dates, no owners. Use as a context manager; on an error the
    shard being written is dropped.
    """

    def __init__(self, pattern: str, *, samples: int = 2000, first: int = 0) -> None:
        """pattern: path with a format field for the number, ending in .tar or .tar.gz. samples: per shard. first:
        number of the first shard.
        """
        try:
            numbered = pattern.endswith((".tar", ".tar.gz")) and pattern.format(0) != pattern.format(1)
        except (ValueError, LookupError):
            numbered = False
        if not numbered:
            raise DataError(f"{pattern}: expected a shard name with a number, such as train-{{:05d}}.tar")
        if samples < 1:
            raise DataError(f"a shard holds at least 1 sample, got {samples}")
        self.pattern, self.samples, self.first = pattern, samples, first
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
            # Half a character, which JSON from outside may hold, stays what it was there: an escape.
            content = json.dumps(meta, ensure_ascii=False, sort_keys=True).encode("utf-8", "backslashreplace")
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
        path = Path(self.pattern.format(self.first + len(self.shards)))
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

        write_file(path, fill)
        self.shards.append(path)
        self._rows, self._keys = [], set()
