"""Where captions go: the terminal, or a file by way of a journal."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import typer

from vlm.apps.common import write_text
from vlm.errors import ConfigError, DataError
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
    """Pictures that had captions of this command before."""
    kept: set[str]
    """Pictures whose texts aren't this command's, and stay as they are."""
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
        self.kept: set[str] = set()
        self.summary = summary_of([])
        self._form, self._header = form, True

    def add(self, name: str, found: Sequence[Caption]) -> None:
        """Print one picture's captions."""
        row = row_of(name, found)
        count(self.summary, row)
        write_text("".join(rendered([row], self._form, header=self._header)), None)
        self._header = False

    def close(self) -> None:
        """Nothing is left to do."""


class Journal:
    """A file that appears whole at the end; until then a journal beside it, from which the next run goes on.

    The journal is begun with the first caption: a run that is refused before that leaves all as it was.
    The settings stand in the journal's first line, and those of a finished file in a hidden one beside it.
    """

    def __init__(
        self, output: Path, form: str, names: Sequence[str], settings: Mapping[str, Any], *, fresh: bool
    ) -> None:
        """Take up the journal, or else the finished file, of an earlier run; fresh: leave what it wrote behind.

        Raises DataError if it can't be read, or something else than captions stands there, ConfigError where it was
        made with other settings.
        """
        self.output, self.form, self._settings = output, form, settings
        self.path, self._about = (output.with_name(f".{output.name}.{ending}") for ending in ("part", "settings"))
        written = _written_form(output)
        rows = [] if fresh else self._take_up(written)
        self.done = {row["path"] for row in rows}
        self.kept: set[str] = set()
        self.summary = summary_of(row for row in rows if row["path"] in set(names))
        self._before = rows
        self._file: TextIO | None = None

    def add(self, name: str, found: Sequence[Caption]) -> None:
        """Write one picture's captions to the journal."""
        row = row_of(name, found)
        count(self.summary, row)
        file = self._begun()
        with writing(self.output):
            file.write("".join(rendered([row], "jsonl")))
            file.flush()

    def close(self) -> None:
        """Make the file of the journal, if anything is in it."""
        file = self._begun()
        with writing(self.output):
            file.close()
            _, rows = _read_journal(self.path)

        def write(file: Any) -> None:
            for part in rendered(rows, self.form):
                file.write(part.encode("utf-8", "backslashreplace"))

        if rows:
            write_file(self.output, write)
            about = settings_line(self._settings).encode()
            write_file(self._about, lambda file: file.write(about), named=self.output)
        self.path.unlink()

    def _begun(self) -> TextIO:
        """The journal, open to be gone on with."""
        if self._file is None:
            begun = settings_line(self._settings) + "".join(rendered(self._before, "jsonl"))
            # Rewritten, since a killed run may have left half a line.
            write_file(self.path, lambda file: file.write(begun.encode("utf-8", "backslashreplace")), named=self.output)
            with writing(self.output):
                self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
            self._before = []
        return self._file

    def _take_up(self, form: str) -> list[Row]:
        """The rows of an earlier run that was made with the same settings."""
        held, rows = _read_journal(self.path)
        if not rows:
            held, rows = _read_journal(self._about)[0], _read_finished(self.output, form)
        if rows and not held:
            typer.echo(f"{self.output}: nothing tells with which settings its captions were made; going on", err=True)
        elif rows:
            way_out = "name another --output, or write all anew with --fresh"
            check_settings(held, self._settings, where=str(self.output), way_out=way_out)
        return rows


def settings_line(settings: Mapping[str, Any]) -> str:
    """What stands before the captions, or the names of their files, that were made with some settings."""
    return json.dumps({"settings": dict(settings)}) + "\n"


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


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raises DataError that names what is being made where what leads to it can't be written."""
    try:
        yield
    except OSError as problem:
        raise DataError(f"{target}: can't be written ({problem.strerror or problem})") from problem


def check_settings(old: Mapping[str, Any], new: Mapping[str, Any], *, where: str, way_out: str) -> None:
    """Raises ConfigError, which names the first setting that differs from those that captions were made with."""
    changed = next((name for name in new if name in old and old[name] != new[name]), None)
    if changed is not None:
        raise ConfigError(
            f"{where}: holds captions of an earlier run with {changed} {old[changed]!r}, and now it is "
            f"{new[changed]!r}; {way_out}"
        )


def row_of(name: str, found: Sequence[Caption]) -> Row:
    """A picture's captions as JSON values."""
    captions = [{"caption": one.text} | ({} if one.score is None else {"score": round(one.score, 4)}) for one in found]
    return {"path": name, "captions": captions}


def summary_of(rows: Iterable[Row]) -> Summary:
    """Length and repetition of all captions in some rows."""
    from vlm.tasks.caption import Summary

    summary = Summary()
    for row in rows:
        count(summary, row)
    return summary


def count(summary: Summary, row: Row) -> None:
    """Add a row's captions to a summary."""
    for one in row["captions"]:
        summary.add(one["caption"])


def _rows(content: bytes, where: str, number: int = 1) -> list[Row]:
    """The rows of JSON lines, but half of one at the end. number: of the first line, for errors."""
    lines = content.split(b"\n")[:-1]  # behind the last end of line is half a row, or nothing
    return [_parsed(line, f"{where}, line {place}") for place, line in enumerate(lines, number)]


def _read_journal(path: Path) -> tuple[Mapping[str, Any], list[Row]]:
    """The settings of an unfinished run and its rows; both empty where there is none."""
    if not path.is_file():
        return {}, []
    first, _, rest = path.read_bytes().partition(b"\n")
    try:
        settings = dict(json.loads(first)["settings"])
    except (ValueError, KeyError, TypeError):
        return {}, []  # not a line of it was finished
    return settings, _rows(rest, str(path), 2)


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
        return _rows(path.read_bytes(), str(path))
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
