"""``vlm classify``: pictures among labels given as words."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.apps.common import Device, Model, Templates, find_pictures, load_model, read_labels, read_templates, write_text

BAR = 20


def classify(
    paths: Annotated[list[str], typer.Argument(help="Files, folders, globs, or - for a list on standard input.")],
    labels: Annotated[str, typer.Option("--labels", "-l", help="Words, joined by commas.")] = "",
    labels_file: Annotated[Path | None, typer.Option("--labels-file", help="A file with one label a line.")] = None,
    model: Model = "tiny-clip",
    templates: Templates = "none",
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="Labels shown for each picture.")] = 5,
    form: Annotated[str, typer.Option("--format", "-f", help="table, jsonl or csv.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file instead of the terminal.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures that run at once.")] = 64,
    device: Device = "auto",
) -> None:
    """Classify pictures, zero-shot. Exit status 1 when some could not be read, 2 when nothing could be done."""
    from vlm.errors import ConfigError, DataError, nearest
    from vlm.tasks.zero_shot import ZeroShotClassifier, check_labels

    forms = ("table", "jsonl", "csv")
    if form not in forms:
        raise ConfigError(f"--format {form!r}{nearest(form, forms)}: expected one of {', '.join(forms)}")
    words = check_labels(read_labels(labels, labels_file))
    pictures = find_pictures(paths)
    classifier = ZeroShotClassifier(load_model(model, device), words, read_templates(templates), batch_size=batch_size)
    failed: list[str] = []
    rows = list(predictions(classifier, pictures, top_k, failed))
    for message in failed:
        typer.echo(f"skipped: {message}", err=True)
    if not rows:
        raise DataError(f"none of {len(pictures)} pictures could be read")
    write_text({"table": as_table, "jsonl": as_jsonl, "csv": as_csv}[form](rows), output)
    if failed:
        raise typer.Exit(1)


def predictions(
    classifier: Any, pictures: Sequence[str], top_k: int, failed: list[str]
) -> Iterator[tuple[str, list[Any]]]:
    """(path, predictions) of each readable picture, in batches; messages about the others go to `failed`."""
    from vlm.data.images import load_image
    from vlm.errors import DataError

    for start in range(0, len(pictures), classifier.batch_size):
        names, images = [], []
        for path in pictures[start : start + classifier.batch_size]:
            try:
                images.append(load_image(path))
                names.append(path)
            except DataError as error:
                failed.append(str(error))
        if images:
            yield from zip(names, classifier.predict(images, top_k), strict=True)


def as_table(rows: Sequence[tuple[str, list[Any]]]) -> str:
    """A block for each picture, with bars."""
    lines = []
    for path, found in rows:
        lines.append(path)
        width = max(len(prediction.label) for prediction in found)
        for prediction in found:
            bar = "█" * round(BAR * prediction.score)
            lines.append(f"  {prediction.label.ljust(width)}  {100 * prediction.score:5.1f} %  {bar}".rstrip())
    return "\n".join(lines) + "\n"


def as_jsonl(rows: Sequence[tuple[str, list[Any]]]) -> str:
    """A JSON object a line: path, predictions."""
    return "".join(
        json.dumps(
            {"path": path, "predictions": [{"label": p.label, "score": round(p.score, 6)} for p in found]},
            ensure_ascii=False,
        )
        + "\n"
        for path, found in rows
    )


def as_csv(rows: Sequence[tuple[str, list[Any]]]) -> str:
    """A row for each prediction: path, rank, label, score."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["path", "rank", "label", "score"])
    for path, found in rows:
        writer.writerows([path, rank, p.label, f"{p.score:.6f}"] for rank, p in enumerate(found, 1))
    return buffer.getvalue()
