"""Where captions go: the terminal, a file by way of a journal, or a text file beside each picture."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlm.apps.common import write_text
from vlm.errors import DataError
from vlm.files import write_file

if TYPE_CHECKING:
    from vlm.tasks.caption import Caption, Summary

FORMS = ("jsonl", "csv", "txt")
COLUMNS = ["path", "rank", "caption", "score"]
LONGEST_LINE = 1 << 20
"""Bytes that are read of what may be no captions at all."""
Row = dict[str, Any]
"""``path`` and ``captions``, best first: each has its ``caption`` and, where beams were searched, its ``score``."""


class Sink(Protocol):
    """Takes captions as they come."""

    done: set[str]
    """Pictures that had captions before."""
    summary: Summary
    """Of all captions, also those from before."""

    def add(self, name: str, found: Sequence[Caption]) -> None:
        """Write one picture's captions."""

    def close(self) -> None:
        """Put what was written in its place."""


class Terminal:
    """Prints captions as they come."""

    def __init__(self, form: str) -> None:
        self.done: set[str] = set()
        self.summary = _summary([])
        self._form, self._header = form, True

    def add(self, name: str, found: Sequence[Caption]) -> None:
        """Print one picture's captions."""
        row = _row(name, found)
        _count(self.summary, row)
        write_text("".join(rendered([row], self._form, header=self._header)), None)
        self._header = False

    def close(self) -> None:
        """Nothing is left to do."""


class Beside:
    """Writes ``cat.txt`` beside ``cat.png``, a caption a line; one that is there stays."""

    def __init__(self, names: Sequence[str], *, fresh: bool) -> None:
        """Raises DataError for pictures in shards, and for two that would share a file."""
        owners: dict[Path, str] = {}
        for name in names:
            if ":" in name and not Path(name).exists() and Path(name.split(":")[0]).is_file():
                raise DataError(f"{name}: a picture in a shard has no place beside it; use --format jsonl or csv")
            other = owners.setdefault(_beside(name), name)
            if other != name:
                raise DataError(f"{name}: would share {_beside(name)} with {other}; use --format jsonl or csv")
        self.done = set() if fresh else {name for path, name in owners.items() if path.is_file()}
        self.summary = _summary([])
        for name in self.done:
            for line in _beside(name).read_text("utf-8", errors="replace").splitlines():
                self.summary.add(line)

    def add(self, name: str, found: Sequence[Caption]) -> None:
        """Write one picture's file."""
        write_text("".join(f"{one.text}\n" for one in found), _beside(name))
        _count(self.summary, _row(name, found))

    def close(self) -> None:
        """Nothing is left to do."""


class Journal:
    """A file that appears whole at the end; until then a journal beside it, from which the next run goes on.

    The journal is named by the settings too, so that captions of different settings are never mixed unfinished.
    """

    def __init__(self, output: Path, form: str, names: Sequence[str], settings: Any, *, fresh: bool) -> None:
        """Take up the journal, or else the finished file, of an earlier run; fresh: leave what it wrote behind.

        Raises DataError if it can't be read, or something else than captions stands there.
        """
        self.output, self.form = output, form
        written = _written_form(output)
        digest = hashlib.sha256(json.dumps([form, settings], sort_keys=True).encode()).hexdigest()[:12]
        self.path = output.with_name(f".{output.name}.{digest}.part")
        rows: list[Row] = []
        if not fresh:
            rows = _read_lines(self.path) if self.path.is_file() else _read_finished(output, written)
        self.done = {row["path"] for row in rows}
        self.summary = _summary(row for row in rows if row["path"] in set(names))
        # Rewritten, since a killed run may have left half a line.
        write_text("".join(rendered(rows, "jsonl")), self.path)
        self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")

    def add(self, name: str, found: Sequence[Caption]) -> None:
        """Write one picture's captions to the journal."""
        row = _row(name, found)
        _count(self.summary, row)
        self._file.write("".join(rendered([row], "jsonl")))
        self._file.flush()

    def close(self) -> None:
        """Make the file of the journal, if anything is in it."""
        self._file.close()
        rows = _read_lines(self.path)

        def write(file: Any) -> None:
            for part in rendered(rows, self.form):
                file.write(part.encode("utf-8", "backslashreplace"))

        if rows:
            write_file(self.output, write)
        self.path.unlink()


def rendered(rows: Iterable[Row], form: str, *, header: bool = True) -> Iterator[str]:
    """Rows as JSON lines, or as CSV with a line for each caption."""
    for row in rows:
        if form == "jsonl":
            yield json.dumps(row, ensure_ascii=False) + "\n"
            continue
        lines: list[list[Any]] = [COLUMNS] if header else []
        header = False
        for rank, one in enumerate(row["captions"], 1):
            lines.append([row["path"], rank, one["caption"], one.get("score", "")])
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(lines)
        yield buffer.getvalue()


def _row(name: str, found: Sequence[Caption]) -> Row:
    captions = [{"caption": one.text} | ({} if one.score is None else {"score": round(one.score, 4)}) for one in found]
    return {"path": name, "captions": captions}


def _summary(rows: Iterable[Row]) -> Summary:
    from vlm.tasks.caption import Summary

    summary = Summary()
    for row in rows:
        _count(summary, row)
    return summary


def _count(summary: Summary, row: Row) -> None:
    for one in row["captions"]:
        summary.add(one["caption"])


def _beside(name: str) -> Path:
    return Path(name).with_suffix(".txt")


def _read_lines(path: Path) -> list[Row]:
    """The rows of a file of JSON lines, but half of one at its end."""
    lines = path.read_bytes().split(b"\n")[:-1]  # behind the last end of line is half a row, or nothing
    return [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _written_form(path: Path) -> str:
    """The form of the captions in a file, empty where there are none. Raises DataError where it holds anything else."""
    if not path.is_file() or not path.stat().st_size:
        return ""
    with path.open("rb") as file:
        line = file.readline(LONGEST_LINE)
    if line.decode("utf-8", errors="replace").rstrip("\r\n") == ",".join(COLUMNS):
        return "csv"
    if _is_row(line):
        return "jsonl"
    raise DataError(
        f"{path}: holds something else than captions of this command, which they would replace; name another --output"
    )


def _read_finished(path: Path, form: str) -> list[Row]:
    """The rows of an earlier run's result, written in a form; none where that is empty."""
    if not form:
        return []
    if form == "jsonl":
        return _read_lines(path)
    text = path.read_text("utf-8", errors="replace")
    rows: dict[str, Row] = {}
    for number, line in enumerate(list(csv.reader(io.StringIO(text)))[1:], 1):
        try:
            name, _, caption, score = line
            value = {"score": float(score)} if score else {}
        except ValueError as error:
            raise DataError(
                f"{path}, row {number}: damaged, expected {', '.join(COLUMNS)}; mend it, or write all anew with --fresh"
            ) from error
        rows.setdefault(name, {"path": name, "captions": []})["captions"].append({"caption": caption} | value)
    return list(rows.values())


def _parsed(line: bytes, where: str) -> Row:
    if not _is_row(line):
        raise DataError(f"{where}: damaged, expected path and captions; mend it, or write all anew with --fresh")
    found: Row = json.loads(line)
    return found


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
        return isinstance(row["path"], str) and all(isinstance(one["caption"], str) for one in row["captions"])
    except (ValueError, KeyError, TypeError):
        return False
