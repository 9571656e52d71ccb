"""``vlm classify``: pictures among labels given as words."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.apps.common import (
    DEFAULT_MODEL,
    Device,
    LabelsFile,
    Model,
    Templates,
    check_output,
    find_pictures,
    load_model,
    read_labels,
    read_templates,
    write_text,
)
from vlm.errors import ConfigError, DataError, counted, nearest

BAR = 20
Row = tuple[str, list[Any]]
"""A picture's path and its predictions, best first."""


def classify(
    paths: Annotated[list[str], typer.Argument(help="Files, folders, globs, or - for a list on standard input.")],
    labels: Annotated[str, typer.Option("--labels", "-l", help="Words, joined by commas.")] = "",
    labels_file: LabelsFile = None,
    model: Model = DEFAULT_MODEL,
    templates: Templates = "auto",
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Labels shown for each picture.")] = 5,
    form: Annotated[str, typer.Option("--format", "-f", help="table, jsonl or csv.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file instead of the terminal.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures that run at once.")] = 64,
    device: Device = "auto",
) -> None:
    """Classify pictures, zero-shot. Exit status 1 when some could not be read, 2 when nothing could be done."""
    from vlm.tasks.zero_shot import ZeroShotClassifier, check_labels

    if form not in FORMS:
        raise ConfigError(f"--format {form!r}{nearest(form, FORMS)}: expected one of {', '.join(FORMS)}")
    words = check_labels(read_labels(labels, labels_file))
    sentences = read_templates(templates)
    pictures = find_pictures(paths)
    check_output(output, inputs=pictures)
    classifier = ZeroShotClassifier(load_model(model, device), words, sentences, batch_size=batch_size)
    failed: list[str] = []
    parts = FORMS[form](predictions(classifier, pictures, top_k, failed))
    if output is None:
        for part in parts:  # as they come
            write_text(part, None)
    else:
        text = "".join(parts)
        if len(failed) < len(pictures):
            write_text(text, output)
    finish(failed, len(pictures))


def predictions(classifier: Any, pictures: Sequence[str], top_k: int, failed: list[str]) -> Iterator[Row]:
    """Path and predictions of each readable picture; the others are reported on stderr and go to `failed`."""

    def skip(path: Any, error: Exception) -> None:
        message = str(error) if str(path) in str(error) else f"{path}: {error}"
        typer.echo(f"skipped: {message}", err=True)
        failed.append(str(path))

    yield from classifier.predict_each(pictures, top_k, on_error=skip)


def finish(failed: Sequence[str], count: int) -> None:
    """Leave with status 1 when some pictures could not be read; DataError when none could."""
    if len(failed) == count:
        raise DataError("no picture could be read" if count > 1 else "the picture could not be read")
    if failed:
        typer.echo(f"{len(failed)} of {counted(count, 'picture')} could not be read", err=True)
        raise typer.Exit(1)


def as_table(rows: Iterator[Row]) -> Iterator[str]:
    """A block for each picture, with bars."""
    block = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    for path, found in rows:
        width = max(len(prediction.label) for prediction in found)
        lines = [path]
        for prediction in found:
            bar = block * round(BAR * prediction.score)
            lines.append(f"  {prediction.label.ljust(width)}  {100 * prediction.score:5.1f} %  {bar}".rstrip())
        yield "\n".join(lines) + "\n"


def as_jsonl(rows: Iterator[Row]) -> Iterator[str]:
    """A JSON object a line: path, predictions."""
    for path, found in rows:
        listed = [{"label": p.label, "score": round(p.score, 6)} for p in found]
        yield json.dumps({"path": path, "predictions": listed}, ensure_ascii=False) + "\n"


def as_csv(rows: Iterator[Row]) -> Iterator[str]:
    """A header, then a row for each prediction: path, rank, label, score."""
    header: list[list[Any]] = [["path", "rank", "label", "score"]]
    for path, found in rows:
        buffer = io.StringIO()
        lines = [[path, rank, p.label, f"{p.score:.6f}"] for rank, p in enumerate(found, 1)]
        csv.writer(buffer, lineterminator="\n").writerows(header + lines)
        header = []
        yield buffer.getvalue()


FORMS: dict[str, Callable[[Iterator[Row]], Iterator[str]]] = {"table": as_table, "jsonl": as_jsonl, "csv": as_csv}
