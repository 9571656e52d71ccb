"""Pictures with texts from anywhere, by one name: shards, folders, tables, or the repository's own sets."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.images import SUFFIXES, read_encoded
from vlm.data.loader import Source
from vlm.data.samples import Problems, Sample, caption_length, fingerprint, with_captions
from vlm.data.shards import ENDINGS, ShardSource, find_shards
from vlm.errors import DataError, nearest

BUILT_IN = ("human-train", "web-train", "unseen-concept", "web-val", "web-test", "unseen-artist")
IMAGE_COLUMNS = ("image", "filepath", "file", "path", "filename", "image_path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
ACCEPTED = (
    "a folder of pictures with .txt files beside them, a folder of class folders, a .csv or .tsv table, "
    f"a .jsonl file, tar shards (file, folder, glob or braces), or one of {', '.join(BUILT_IN)}"
)


class FileSource:
    """Pictures that lie in files of their own, with their texts already read."""

    def __init__(self, name: str, root: Path, rows: Sequence[tuple[str, dict[str, Any]]], problems: Problems) -> None:
        """rows: (path below `root`, sample JSON). Raises DataError when there are none."""
        self.name, self.root, self.problems = name, root, problems
        self.keys = [key for key, _ in rows]
        self._metas = [meta for _, meta in rows]
        self.concepts = [str(meta.get("concept") or key) for key, meta in rows]
        self.lengths = np.array([caption_length(meta) for meta in self._metas], dtype=np.int32)
        problems.log(name)
        if not rows:
            found = f" ({problems.summary()})" if problems.total else ""
            raise DataError(f"{name}: no picture with a text there{found}; expected {ACCEPTED}")

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
        """Hash of keys, texts and file sizes."""
        sizes = [(self.root / key).stat().st_size for key in self.keys]
        texts = (f"{c}\0{'|'.join(m['captions'])}" for c, m in zip(self.concepts, self._metas, strict=True))
        return fingerprint(self.keys, texts, np.array(sizes))


class Joined:
    """Several sources as one, in their order."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.name = ", ".join(part.name for part in parts)
        self.keys = [key for part in parts for key in part.keys]
        self.concepts = [concept for part in parts for concept in part.concepts]
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
        sample: Sample = part[inside]
        return sample

    def meta(self, number: int) -> dict[str, Any]:
        """The JSON of a sample without its picture."""
        part, inside = self._find(number)
        found: dict[str, Any] = part.meta(inside)
        return found

    def fingerprint(self) -> str:
        """Hash of the parts' own."""
        return fingerprint([part.fingerprint() for part in self.parts], [""] * len(self.parts))

    def _find(self, number: int) -> tuple[Any, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self.parts[part], number - (int(self._ends[part - 1]) if part else 0)


def open_source(spec: str | Path | Sequence[str]) -> Any:
    """Open pictures with texts.

    spec: a folder of pictures with ``.txt`` files beside them (a line is a caption), a folder of class
    folders, a CSV or TSV table (columns image and caption; several rows of one image are its captions), JSON
    lines (likewise), tar shards (file, folder, glob, braces, address), a built-in name such as
    ``human-train``, or several of these in a list or joined by commas.

    Returns a `Source` that also has `keys`, `concepts` and `meta(number)`. What can't be used is counted in
    `problems` and reported. Raises DataError when nothing is there, or nothing usable.
    """
    if isinstance(spec, str | Path):
        text = str(spec)
        whole = Path(text).exists() or "{" in text or text.startswith("pipe:")
        specs = [text] if whole else [part.strip() for part in text.split(",") if part.strip()]
    else:
        specs = [str(part) for part in spec]
    if not specs:
        raise DataError(f"no data was named; expected {ACCEPTED}")
    parts = [_open_one(part) for part in specs]
    return parts[0] if len(parts) == 1 else Joined(parts)


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
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [Label(row["concept"], row["name"], row["group"], row["flag"] == "1") for row in rows]


def _open_one(spec: str) -> Source:
    if spec in BUILT_IN:
        folder = data_dir() / ("openmoji" if spec == "unseen-artist" else "")
        return ShardSource(find_shards(str(folder / f"{spec}-*.tar.gz")), name=spec)
    path = Path(spec)
    if path.is_dir():
        if any(child.name.endswith(ENDINGS) for child in path.iterdir()):
            return ShardSource(find_shards(spec), name=spec)
        return _open_folder(path)
    if path.suffix.lower() in TABLES:
        return _open_table(path)
    if spec.endswith(ENDINGS) or any(mark in spec for mark in "{*?") or "://" in spec or spec.startswith("pipe:"):
        return ShardSource(find_shards(spec), name=spec)
    state = "not a kind of data that is known" if path.exists() else "no such file or folder"
    raise DataError(f"{spec}: {state}{nearest(spec, BUILT_IN)}; expected {ACCEPTED}")


def _open_folder(folder: Path) -> FileSource:
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    problems = Problems()
    rows = []
    sidecars = any(picture.with_suffix(".txt").is_file() for picture in pictures)
    for picture in pictures:
        key = picture.relative_to(folder).as_posix()
        if sidecars:
            meta = _sidecar(picture.with_suffix(".txt"), key, problems)
        elif "/" in key:
            name = key.split("/")[0].replace("_", " ")
            meta = {"captions": [name], "concept": name, "name": name}
        else:
            problems.add("picture without a .txt file beside it", key)
            meta = None
        if meta is not None:
            rows.append((key, meta))
    return FileSource(str(folder), folder, rows, problems)


def _sidecar(path: Path, key: str, problems: Problems) -> dict[str, Any] | None:
    try:
        return with_captions({}, path.read_text("utf-8-sig").splitlines())
    except FileNotFoundError:
        problems.add("picture without a .txt file beside it", key)
    except (OSError, UnicodeDecodeError):
        problems.add("text that can't be read", path.name)
    except ValueError:
        problems.add("empty text", path.name)
    return None


def _open_table(path: Path) -> FileSource:
    problems = Problems()
    merged: dict[str, dict[str, Any]] = {}
    for number, row in _table_rows(path, problems):
        where = f"{path.name}, row {number}"
        image = str(row.pop("image") or "").strip()
        if not image or not (path.parent / image).is_file():
            problems.add("picture isn't there", f"{where}: {image or 'no name'}")
            continue
        try:
            meta = with_captions(row)
        except ValueError:
            problems.add("no caption", where)
            continue
        known = merged.setdefault(image, meta)
        if known is not meta:
            known["captions"] = list(dict.fromkeys([*known["captions"], *meta["captions"]]))
    return FileSource(str(path), path.parent, list(merged.items()), problems)


def _table_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row number (the file's line) and values, the picture's column named ``image``."""
    try:
        file = path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from error
    with file:
        try:
            if path.suffix.lower() in (".csv", ".tsv"):
                yield from _csv_rows(path, file)
            else:
                yield from _json_rows(path, file, problems)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error})") from error
        except csv.Error as error:
            raise DataError(f"{path}: not a table ({error})") from error


def _csv_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    columns = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = [name.lower() for name in columns]
    image = _column(path, reader.fieldnames, IMAGE_COLUMNS)
    _column(path, reader.fieldnames, CAPTION_COLUMNS)
    for row in reader:
        values = {key: value for key, value in row.items() if key is not None}
        yield reader.line_num, {**values, "image": values.get(image)}


def _json_rows(path: Path, file: Iterable[str], problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            problems.add("not a JSON object", f"{path.name}, row {number}")
            continue
        image = next((row[name] for name in IMAGE_COLUMNS if name in row), None)
        yield number, {**row, "image": image}


def _column(path: Path, found: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in found:
            return name
    raise DataError(f"{path}: expected a column named {' or '.join(wanted)}, found {', '.join(found) or 'no columns'}")
