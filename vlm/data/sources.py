"""Pictures with texts from anywhere, by one name: shards, folders, tables, or the repository's own sets."""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm.data.images import SUFFIXES, read_encoded
from vlm.data.samples import ABSENT, EMPTY, OWN, Problems, Sample, caption_length, fingerprint, with_captions
from vlm.data.shards import ENDINGS, ShardSource, find_shards
from vlm.data.tables import TABLES, table_rows
from vlm.errors import DataError, nearest

BUILT_IN = ("human-train", "web-train", "unseen-concept", "web-val", "web-test", "unseen-artist")
ACCEPTED = (
    "a folder of pictures with .txt files beside them, a folder of class folders, a .csv or .tsv table, "
    f"a .jsonl file, tar shards (file, folder, glob, braces or address), or one of {', '.join(BUILT_IN)}"
)


class Source(Protocol):
    """Pictures with texts by number; their order never changes."""

    name: str
    keys: list[str]
    """Each sample's name in its shard, folder or table."""
    concepts: list[str]
    """What each picture shows; samples of one concept are each other's positives."""
    lengths: np.ndarray
    """(n,) int32, characters of each sample's captions, averaged."""
    problems: Problems
    """What could not be used."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Sample:
        """The sample, its picture still encoded; raises DataError when it is gone."""
        ...

    def meta(self, number: int) -> dict[str, Any]:
        """The sample's JSON without its picture."""
        ...

    def fingerprint(self) -> str:
        """Hash of the content, the same wherever it lies."""
        ...


class FileSource:
    """Pictures that lie in files of their own, with their texts already read."""

    def __init__(self, name: str, root: Path, rows: Sequence[tuple[str, dict[str, Any]]], problems: Problems) -> None:
        """rows: (path below `root`, sample JSON). Raises DataError when there are none."""
        self.name, self.root, self.problems = name, root, problems
        self.keys = [key for key, _ in rows]
        self._metas = [meta for _, meta in rows]
        self.concepts = [str(meta.get("concept") or f"{OWN}{key}") for key, meta in rows]
        self.lengths = np.array([caption_length(meta) for meta in self._metas], dtype=np.int32)
        problems.log(name)
        if not rows:
            found = f" ({problems.summary()})" if problems.total else ""
            raise DataError(f"{name}: no usable picture there{found}; expected {ACCEPTED}")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Sample:
        """The sample; raises DataError when its file has gone since the source was opened."""
        content, _ = read_encoded(self.root / self.keys[number])
        return Sample(self.keys[number], content, self._metas[number])

    def meta(self, number: int) -> dict[str, Any]:
        """The JSON of a sample without its picture."""
        return self._metas[number]

    def fingerprint(self) -> str:
        """Hash of keys, texts and file sizes. Raises DataError when a file has gone."""
        try:
            sizes = [(self.root / key).stat().st_size for key in self.keys]
        except OSError as error:
            raise DataError(f"{self.name}: {error.filename}: {error.strerror or error}") from error
        texts = (f"{c}\0{'|'.join(m['captions'])}" for c, m in zip(self.concepts, self._metas, strict=True))
        return fingerprint(self.keys, texts, np.array(sizes))


class Joined:
    """Several sources as one, in their order."""

    def __init__(self, parts: Sequence[Source]) -> None:
        """parts: at least one."""
        self.parts = list(parts)
        self.name = ", ".join(part.name for part in parts)
        self.keys = [key for part in parts for key in part.keys]
        # Two folders may each hold a 1.jpg, or a 00000.tar with the same keys.
        self.concepts = [
            f"{OWN}{number}:{concept.removeprefix(OWN)}" if concept.startswith(OWN) else concept
            for number, part in enumerate(parts)
            for concept in part.concepts
        ]
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.problems = Problems()
        for part in parts:
            self.problems.merge(part.problems)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Sample:
        """The sample with this number over all parts."""
        part, inside = self._find(number)
        return part[inside]

    def meta(self, number: int) -> dict[str, Any]:
        """The JSON of a sample without its picture."""
        part, inside = self._find(number)
        return part.meta(inside)

    def fingerprint(self) -> str:
        """Hash of the parts' own."""
        return fingerprint([part.fingerprint() for part in self.parts], [""] * len(self.parts))

    def _find(self, number: int) -> tuple[Source, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self.parts[part], number - (int(self._ends[part - 1]) if part else 0)


def open_source(spec: str | Path | Sequence[str | Path], *, textless: bool = False) -> Source:
    """Open pictures with texts.

    spec: a folder of pictures with ``.txt`` files beside them (a line is a caption), a folder of class
    folders, a CSV or TSV table (columns image and caption; several rows of one image are its captions), JSON
    lines (likewise), tar shards (file, folder, glob, braces, address), a built-in name such as
    ``human-train`` (or ``builtin:human-train``; `./human-train` for a folder of that name), or several of
    these in a list or joined by commas. Paths in a table are relative to the table's folder.
    textless: whether pictures without a text are taken too, with no captions; nothing that trains can use those.

    What can't be used is counted in the source's `problems` and logged, shards without samples too as long as others
    are named that have some. Raises DataError when nothing is there, or nothing usable.
    """
    if isinstance(spec, str | Path):
        text = str(spec)
        whole = "{" in text or text.startswith("pipe:") or os.path.exists(text)
        specs = [text] if whole else [part.strip() for part in text.split(",") if part.strip()]
    else:
        specs = [str(part) for part in spec]
    if not specs:
        raise DataError(f"no data was named; expected {ACCEPTED}")
    parts: list[Source] = []
    empty: dict[str, DataError] = {}
    for part in specs:
        try:
            parts.append(_open_one(part, textless))
        except DataError as error:
            if error.reason != EMPTY:
                raise
            empty[part] = error
    if not parts:
        raise DataError("; ".join(map(str, empty.values())))
    source = parts[0] if len(parts) == 1 else Joined(parts)
    for part in empty:
        source.problems.add(EMPTY, part)
    return source


def data_dir() -> Path:
    """Folder of the repository's own shards: $VLM_DATA, else ``./data``, else the one beside the package.

    Raises DataError when none holds a manifest.
    """
    given = os.environ.get("VLM_DATA")
    beside = Path(__file__).resolve().parents[2] / "data"
    places = [Path(given).expanduser()] if given else [Path("data"), beside]
    for place in places:
        if (place / "manifest.json").is_file():
            return place
    looked = ", ".join(map(str, places))
    raise DataError(
        f"the repository's data isn't in {looked}: run in a checkout, set VLM_DATA to its data folder, "
        "or build it with `vlm data build --out data`"
    )


@dataclass(frozen=True)
class Label:
    """One of the emoji concepts."""

    concept: str
    name: str
    group: str
    flag: bool


def labels_table() -> list[Label]:
    """All labelled concepts of the repository's data, in their order."""
    path = data_dir() / "labels.tsv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read ({error}); build it with `vlm data build`") from error
    columns = ["concept", "name", "group", "flag"]
    if not rows or rows[0] != columns:
        found = ", ".join(rows[0]) if rows else "an empty file"
        raise DataError(f"{path}, row 1: expected the columns {', '.join(columns)}, found {found}")
    labels = []
    for number, row in enumerate(rows[1:], 2):
        if len(row) != 4 or row[3] not in ("0", "1"):
            raise DataError(f"{path}, row {number}: expected concept, name, group and 0 or 1, found {row}")
        labels.append(Label(row[0], row[1], row[2], row[3] == "1"))
    return labels


def _open_one(spec: str, textless: bool) -> Source:
    name = spec.removeprefix("builtin:")
    if name in BUILT_IN:
        return _built_in(name, textless)
    if name != spec:
        raise DataError(f"{spec}: no such set{nearest(name, BUILT_IN)}, there are {', '.join(BUILT_IN)}")
    path = Path(spec).expanduser()
    try:
        if path.is_dir():
            if any(child.name.endswith(ENDINGS) for child in path.iterdir()):
                return ShardSource(find_shards(str(path)), name=spec, textless=textless)
            return _open_folder(path, textless)
    except OSError as error:
        raise DataError(f"{spec}: the folder can't be read ({error.strerror or error})") from error
    if path.suffix.lower() in TABLES:
        return _open_table(path, textless)
    if spec.startswith("pipe:") or "://" in spec:
        return ShardSource(find_shards(spec), name=spec, textless=textless)
    if spec.endswith(ENDINGS) or any(mark in spec for mark in "{*?["):
        return ShardSource(find_shards(str(path)), name=spec, textless=textless)
    state = "not a kind of data that is known" if os.path.exists(path) else "no such file or folder"
    raise DataError(f"{spec}: {state}{nearest(spec, BUILT_IN)}; expected {ACCEPTED}")


def _built_in(name: str, textless: bool) -> ShardSource:
    folder = data_dir()
    pattern = f"openmoji/{name}-*.tar*" if name == "unseen-artist" else f"{name}-*.tar*"
    shards = sorted(str(path) for path in folder.glob(pattern) if path.name.endswith(ENDINGS))
    if not shards:
        raise DataError(f"{folder}: no shards {pattern} there; build them with `vlm data build`")
    return ShardSource(shards, name=name, textless=textless)


def _open_folder(folder: Path, textless: bool) -> FileSource:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    pictures = sorted(path for path in found if not _hidden(path.relative_to(folder)) and path.is_file())
    problems = Problems()
    rows = []
    sidecars = any(picture.with_suffix(".txt").is_file() for picture in pictures)
    for picture in pictures:
        key = picture.relative_to(folder).as_posix()
        meta: dict[str, Any] | None = None
        if sidecars:
            meta = _sidecar(picture.with_suffix(".txt"), key, problems, textless)
        elif "/" in key:
            name = " ".join(key.split("/")[0].replace("_", " ").split())
            meta = with_captions({"captions": [name or key.split("/")[0]], "concept": name, "name": name})
        elif textless:
            meta = {"captions": []}
        else:
            problems.add("picture without a .txt file beside it", key)
        if meta is not None:
            rows.append((key, meta))
    return FileSource(str(folder), folder, rows, problems)


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _sidecar(path: Path, key: str, problems: Problems, textless: bool) -> dict[str, Any] | None:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
        return with_captions({}, lines, textless=textless, report=lambda reason: problems.add(reason, key))
    except FileNotFoundError:
        if textless:
            return {"captions": []}
        problems.add("picture without a .txt file beside it", key)
    except (OSError, UnicodeDecodeError):
        problems.add("text that can't be read", f"{key}: its .txt file")
    except ValueError:
        problems.add("no caption", f"{key}: its .txt file is empty")
    return None


def _open_table(path: Path, textless: bool) -> FileSource:
    problems = Problems()
    merged: dict[str, dict[str, Any]] = {}
    for number, row in table_rows(path, problems, textless=textless):
        where = f"{path.name}, row {number}"
        named = row.pop("image")
        image = posixpath.normpath(named.strip()) if isinstance(named, str) and named.strip() else ""
        if not image or not os.path.isfile(path.parent / image):
            problems.add(ABSENT, f"{where}: {image or 'no name'}")
            continue
        meta = _row_meta(row, where, problems, textless)
        if meta is None:
            continue
        known = merged.setdefault(image, meta)
        if known is not meta:
            fresh = [caption for caption in meta["captions"] if caption not in known["captions"]]
            if "pairs" in meta:  # the same answer may belong to several questions
                known["pairs"] = known.get("pairs", []) + meta["pairs"]
            elif len(fresh) < len(meta["captions"]):
                problems.add("same caption twice for one picture, kept once", where)
            known["captions"] += fresh
    return FileSource(str(path), path.parent, list(merged.items()), problems)


def _row_meta(row: dict[str, Any], where: str, problems: Problems, textless: bool) -> dict[str, Any] | None:
    try:
        meta = with_captions(row, textless=textless, report=lambda reason: problems.add(reason, where))
    except ValueError:
        problems.add("no caption", where)
        return None
    if isinstance(meta.get("tags"), str):  # a table's cell
        meta["tags"] = [tag.strip() for tag in meta["tags"].split(",") if tag.strip()]
    return meta
