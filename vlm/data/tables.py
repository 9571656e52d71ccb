"""Rows of CSV, TSV and JSON-lines files that name pictures and their texts."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm.data.samples import Problems, parse_json
from vlm.errors import DataError

IMAGE_COLUMNS = ("image", "filepath", "file", "path", "file_name", "filename", "image_path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "answer", "answers")
ADDRESS_COLUMNS = ("url", "image_url")
END = "\0end of the table"
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")


def table_rows(
    path: Path, problems: Problems, *, names: Sequence[str] = IMAGE_COLUMNS, textless: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and values of each row, the picture's path under ``image``; it stands under one of `names`.

    textless: whether the column of texts may be missing. Column names are blind to case. Lines that are no JSON
    object are counted in `problems`. Raises DataError when the file can't be read as text, isn't a table, or lacks a
    column of pictures or of texts.
    """
    try:
        file = path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from error
    with file:
        number = 0
        try:
            read = (
                _csv_rows(path, file, names, textless)
                if path.suffix.lower() in (".csv", ".tsv")
                else _json_rows(path, file, problems, names, textless)
            )
            for number, row in read:
                yield number, row
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text after row {number} ({error}); save it as UTF-8") from error
        except csv.Error as error:
            raise DataError(f"{path}: not a table after row {number} ({error})") from error


def _csv_rows(
    path: Path, file: Iterable[str], names: Sequence[str], textless: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = iter(file)
    head = next(lines, "")
    # A quote that is never closed takes in all that follows, this last line too.
    reader = csv.reader(itertools.chain([head], lines, [END]), delimiter=_delimiter(path, head))
    columns = [name.strip().lower() for name in next(reader, [])]
    image = _image_column(path, columns, names, textless)
    before = reader.line_num
    for row in reader:
        if row == [END]:
            return
        if row and row[-1].endswith(END):
            raise DataError(
                f'{path}, row {before + 1}: a quote (") is opened and never closed, so that the rest of the file '
                "would be one text; close it, or double it where it belongs to the text"
            )
        before = reader.line_num
        if row:
            values = dict(zip(columns, row, strict=False))
            yield reader.line_num, {**values, "image": values.get(image, "")}


def _delimiter(path: Path, head: str) -> str:
    """By the file's ending; a header without it goes by what it holds (spreadsheets save ``;`` as CSV)."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    return next((mark for mark in (usual, "\t", ";", ",") if mark in head), usual)


def _json_rows(
    path: Path, file: Iterable[str], problems: Problems, names: Sequence[str], textless: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    columns: dict[str, None] = {}
    named = False
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            problems.add("not a JSON object", f"{path.name}, row {number}")
            continue
        values = {name.lower(): value for name, value in row.items()}
        image = next((name for name in names if name in values), None)
        if not named:
            columns |= dict.fromkeys(values)
            named = image is not None and (textless or any(name in values for name in CAPTION_COLUMNS))
        yield number, {**values, "image": values[image] if image else ""}
    if columns and not named:
        _image_column(path, list(columns), names, textless)


def _image_column(path: Path, found: Sequence[str], names: Sequence[str], textless: bool) -> str:
    """The column of pictures among those found; makes sure that there is one of texts too."""
    image = next((name for name in names if name in found), None)
    text = next((name for name in CAPTION_COLUMNS if name in found), None)
    shown = ", ".join(found) or "no columns"
    if image is None:
        advice = ""
        if any(name in found for name in ADDRESS_COLUMNS):
            advice = "; addresses aren't fetched: download the pictures first (img2dataset makes tar shards)"
        raise DataError(f"{path}: expected a column named {' or '.join(names)}, found {shown}{advice}")
    if text is None and not textless:
        raise DataError(f"{path}: expected a column named {' or '.join(CAPTION_COLUMNS)}, found {shown}")
    return image
