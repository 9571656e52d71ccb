"""What several commands share: options, labels, files of pictures, tables, and writing results whole."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.errors import ConfigError, DataError

Model = Annotated[str, typer.Option("--model", "-m", help="Shipped name, folder, repo id, open_clip:ARCH/TAG, file.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Templates = Annotated[
    str, typer.Option("--templates", help="none, single, drawing, drawings, imagenet, a file, or a sentence with {}.")
]


def load_model(name: str, device: str) -> Any:
    """The model on its device."""
    from vlm.weights.load import load

    return load(name, device=None if device == "auto" else device)


def read_labels(labels: str, labels_file: Path | None) -> list[str]:
    """Labels from ``a,b,c`` or from a file with one a line. Raises ConfigError unless exactly one is given."""
    if bool(labels.strip()) == (labels_file is not None):
        raise ConfigError("name the labels with --labels cat,dog or with --labels-file FILE (one a line), not both")
    if labels_file is None:
        return [part.strip() for part in labels.split(",")]
    return read_lines(labels_file, "labels")


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that aren't blank. Raises DataError when it can't be read or holds none."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the {what} can't be read ({error})") from error
    if not lines:
        raise DataError(f"{path}: holds no {what}")
    return lines


def read_templates(templates: str) -> str | list[str]:
    """A set's name or a sentence as it is; the lines of a file where one has that name."""
    path = Path(templates)
    return read_lines(path, "templates") if "{" not in templates and path.is_file() else templates


def find_pictures(places: Sequence[str]) -> list[str]:
    """Files named by paths, folders (recursive), globs, or ``-`` for a list on standard input.

    A path that isn't there stays in the list, so that it is reported. Raises DataError when nothing is named.
    """
    from vlm.data.images import SUFFIXES

    found: list[str] = []
    for place in places:
        if place == "-":
            found += [line.strip() for line in sys.stdin if line.strip()]
        elif Path(place).is_dir():
            found += [str(p) for p in sorted(Path(place).rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
        elif glob.has_magic(place) and not Path(place).exists():
            found += sorted(glob.glob(place, recursive=True))
        else:
            found.append(place)
    if not found:
        raise DataError(f"no pictures in {', '.join(places)}; name files, folders or globs, or - for a list on stdin")
    return found


def write_text(text: str, output: Path | None) -> None:
    """To a file, which appears whole, or to the terminal."""
    if output is None:
        typer.echo(text, nl=not text.endswith("\n"))
        return
    temporary = output.with_name(f".tmp-{output.name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, "utf-8")
        os.replace(temporary, output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{output}: can't be written ({error.strerror or error})") from error


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown, columns aligned."""
    cells = [list(map(str, header)), *([str(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def percent(figure: Any) -> str:
    """A figure with its interval."""
    return f"{100 * figure.value:.1f} [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"


def log_warnings() -> None:
    """Show the package's warnings on stderr."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
