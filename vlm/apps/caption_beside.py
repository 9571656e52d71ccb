"""Captions in a text file beside each picture, and a record of which of these texts are ours to replace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.apps.caption_files import check_settings, count, row_of, settings_line, summary_of, writing
from vlm.apps.common import write_text
from vlm.errors import DataError

if TYPE_CHECKING:
    from vlm.tasks.caption import Caption

RECORD = ".vlm-captions.jsonl"
"""In each folder with texts of ours: a line with the settings of a run, then one with the hash of each of its texts."""


class Beside:
    """Writes ``cat.txt`` beside ``cat.png``, a caption a line; one that it didn't write itself stays."""

    def __init__(self, names: Sequence[str], settings: Mapping[str, Any], *, fresh: bool, overwrite: bool) -> None:
        """Find out which pictures have a text: ours are `done` unless fresh, others' are `kept` unless overwrite.

        Raises DataError for pictures in shards, and for two that would share a file, ConfigError where ours were made
        with other settings.
        """
        owners = _owners(names)
        self._settings, self._records = settings, dict[Path, _Record]()
        self.done: set[str] = set()
        self.kept: set[str] = set()
        self.summary = summary_of([])
        for path, name in owners.items():
            if not path.exists():
                continue
            made = self._record(path).made(path)
            if made is None:
                if not overwrite:
                    self.kept.add(name)
            elif not fresh:
                way_out = "write all anew with --fresh, or into a file with --format jsonl --output FILE"
                check_settings(made, settings, where=str(path), way_out=way_out)
                self.done.add(name)
                for line in path.read_text("utf-8").splitlines():
                    self.summary.add(line)

    def add(self, name: str, found: Sequence[Caption]) -> None:
        """Write one picture's file."""
        path, text = _beside(name), "".join(f"{one.text}\n" for one in found)
        with writing(path):
            # Before the text: one that a kill left without its line would be taken for somebody else's.
            self._record(path).add(path, text, self._settings)
        write_text(text, path)
        count(self.summary, row_of(name, found))

    def close(self) -> None:
        """Nothing is left to do."""

    def _record(self, path: Path) -> _Record:
        if path.parent not in self._records:
            self._records[path.parent] = _Record(path.parent / RECORD)
        return self._records[path.parent]


class _Record:
    """Which texts of a folder were written by this command, and with which settings."""

    def __init__(self, path: Path) -> None:
        self._path, self._begun = path, False
        self._made: dict[str, tuple[str, Mapping[str, Any]]] = {}  # hash and settings of each text, by its name
        settings: Mapping[str, Any] = {}
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        for line in lines:
            row = _record_row(line)
            if isinstance(row.get("settings"), Mapping):
                settings = row["settings"]
            elif "text" in row:
                self._made[str(row["text"])] = (str(row.get("sha256")), settings)

    def made(self, path: Path) -> Mapping[str, Any] | None:
        """The settings that a text was made with; None for one that this command didn't write as it stands there."""
        digest, settings = self._made.get(path.name, ("", {}))
        return settings if digest and path.is_file() and _digest(path.read_bytes()) == digest else None

    def add(self, path: Path, text: str, settings: Mapping[str, Any]) -> None:
        """Note a text before it is written."""
        begun = "" if self._begun else f"\n{settings_line(settings)}"  # a killed run may have left half a line
        content = text.encode("utf-8", errors="backslashreplace")
        with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(begun + json.dumps({"text": path.name, "sha256": _digest(content)}) + "\n")
        self._begun = True


def _owners(names: Sequence[str]) -> dict[Path, str]:
    """The picture of each text file. Raises DataError as `Beside`."""
    owners: dict[Path, str] = {}
    for name in names:
        if ":" in name and not Path(name).exists() and Path(name.split(":")[0]).is_file():
            raise DataError(f"{name}: a picture in a shard has no place beside it; use --format jsonl or csv")
        other = owners.setdefault(_beside(name), name)
        if other != name:
            raise DataError(f"{name}: would share {_beside(name)} with {other}; use --format jsonl or csv")
    return owners


def _beside(name: str) -> Path:
    return Path(name).with_suffix(".txt")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _record_row(line: bytes) -> Mapping[str, Any]:
    """A line of the record; nothing where a killed run left half of one."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, Mapping) else {}
