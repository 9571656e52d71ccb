"""``vlm eval``: figures with intervals, written to files that the README quotes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.apps.common import (
    Device,
    Model,
    Templates,
    load_model,
    log_warnings,
    percent,
    read_templates,
    table,
    write_text,
)

app = typer.Typer(help="Measure a model on a data set.", no_args_is_help=True)

Data = Annotated[str, typer.Option("--data", "-d", help="Shards, folder, table, ImageFolder or a built-in name.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.json and its companions.")]
LabelsFile = Annotated[
    Path | None, typer.Option("--labels-file", help="Labels, one a line; else all emoji names, or the data's own.")
]
NoFlags = Annotated[bool, typer.Option("--no-flags", help="Leave the pictures of flags out (not their labels).")]


@app.command("zero-shot")
def zero_shot(
    data: Data,
    model: Model = "tiny-clip",
    labels_file: LabelsFile = None,
    templates: Templates = "none",
    no_flags: NoFlags = False,
    out: Out = None,
    device: Device = "auto",
) -> None:
    """Top-1 and top-5 of zero-shot classification, per class, and a picture of what is taken for what."""
    from vlm.tasks.confusion import confusion_picture
    from vlm.tasks.evaluate import evaluate_zero_shot

    log_warnings()
    source, labels, keep = _task(data, labels_file, no_flags)
    report = evaluate_zero_shot(
        load_model(model, device), source, labels, templates=read_templates(templates), keep=keep
    )
    rows = [(f"top-{k}", percent(figure), f"{100 * figure.chance:.2f}") for k, figure in report.top.items()]
    typer.echo(f"{report.model} on {report.data}: {len(report.truth)} pictures, {len(report.labels)} labels")
    typer.echo(table(["measure", "% [95 % interval]", "chance %"], rows))
    if out is not None:
        _write_json(out / "report.json", report.as_dict() | {"templates": templates, "flags": not no_flags})
        classes = report.per_class()
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(classes[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(classes)
        write_text(buffer.getvalue(), out / "per_class.csv")
        confusion_picture(report.labels, report.truth, report.predicted, source, out / "confusion.png")


@app.command()
def retrieval(
    data: Data,
    model: Model = "tiny-clip",
    distractors: Annotated[str, typer.Option(help="More pictures to fill the gallery, never asked for.")] = "",
    gallery: Annotated[int, typer.Option(help="Pictures and texts that a query is searched among.")] = 500,
    seed: Annotated[int, typer.Option(help="Draws the galleries and the bootstrap.")] = 0,
    out: Out = None,
    device: Device = "auto",
) -> None:
    """Recall at 1, 5 and 10, pictures by text and texts by picture."""
    from vlm.data.sources import open_source
    from vlm.tasks.retrieval import evaluate_retrieval

    log_warnings()
    more = open_source(distractors) if distractors else None
    report = evaluate_retrieval(
        load_model(model, device), open_source(data), distractors=more, gallery=gallery, seed=seed
    )
    rows = [
        (way.replace("_", " "), f"R@{k}", percent(figure), f"{100 * figure.chance:.2f}")
        for way, at in report.recall.items()
        for k, figure in at.items()
    ]
    typer.echo(
        f"{report.model} on {report.data}: {report.queries} queries each way, "
        f"{report.galleries} galleries of {report.gallery}"
    )
    typer.echo(table(["direction", "measure", "% [95 % interval]", "chance %"], rows))
    if out is not None:
        _write_json(out / "report.json", report.as_dict() | {"distractors": distractors, "seed": seed})


@app.command()
def prompts(
    data: Data,
    model: Model = "tiny-clip",
    labels_file: LabelsFile = None,
    sets: Annotated[str, typer.Option(help="Template sets joined by commas; the first is compared with.")] = (
        "none,drawing,drawings,imagenet"
    ),
    no_flags: NoFlags = False,
    out: Out = None,
    device: Device = "auto",
) -> None:
    """Bare label, one template and ensembles of them, with the paired difference from the first."""
    from vlm.tasks.evaluate import compare_templates

    log_warnings()
    source, labels, keep = _task(data, labels_file, no_flags)
    names = [name.strip() for name in sets.split(",") if name.strip()]
    found = compare_templates(load_model(model, device), source, labels, names, keep=keep)
    rows = []
    for row in found:
        cells: list[Any] = [row["templates"], row["count"]]
        for k in (1, 5):
            cells += [_interval(row[f"top-{k}"]), _interval(row[f"top-{k} against {names[0]}"])]
        rows.append(cells)
    header = ["templates", "count", "top-1 %", f"against {names[0]}", "top-5 %", f"against {names[0]}"]
    typer.echo(table(header, rows))
    if out is not None:
        _write_json(out / "report.json", {"model": model, "data": data, "rows": found})


def _task(data: str, labels_file: Path | None, no_flags: bool) -> tuple[Any, Any, list[str] | None]:
    """Source, labels, and the concepts that count (None for all)."""
    from vlm.apps.common import read_lines
    from vlm.data.sources import labels_table, open_source

    source = open_source(data)
    if labels_file is not None:
        return source, read_lines(labels_file, "labels"), None
    emoji = "emoji" in source.meta(0)
    if not emoji:
        names = dict.fromkeys(
            str(source.meta(i).get("name") or source.meta(i)["captions"][0]) for i in range(len(source))
        )
        return source, list(names), None
    labels = labels_table()
    keep = [label.concept for label in labels if not label.flag] if no_flags else None
    return source, labels, keep


def _interval(found: dict[str, float]) -> str:
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", path)
