"""``vlm eval``: figures with intervals, written to files that the README quotes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.apps.common import (
    DEFAULT_MODEL,
    Device,
    Model,
    Templates,
    check_output,
    load_model,
    log_warnings,
    pair_progress,
    percent,
    read_templates,
    table,
    write_text,
)
from vlm.apps.explain import Layer, Method
from vlm.errors import ConfigError, counted

app = typer.Typer(
    help="Measure a model on a data set. Exit status 1 when some of its pictures could not be read.",
    no_args_is_help=True,
)

Data = Annotated[str, typer.Option("--data", "-d", help="Shards, folder, table, ImageFolder or a built-in name.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.json and its companions.")]
LabelsFrom = Annotated[
    str,
    typer.Option(
        "--labels-from",
        help="emoji (all names of labels.tsv), data (the data's own names), a file, or auto.",
    ),
]
TopK = Annotated[str, typer.Option("--top-k", "-k", help="How many labels count as found, joined by commas.")]
NoFlags = Annotated[bool, typer.Option("--no-flags", help="Leave the pictures of flags out (not their labels).")]


@app.command("zero-shot")
def zero_shot(
    data: Data,
    model: Model = DEFAULT_MODEL,
    labels_from: LabelsFrom = "auto",
    templates: Templates = "auto",
    top_k: TopK = "1,5",
    no_flags: NoFlags = False,
    out: Out = None,
    device: Device = "auto",
) -> None:
    """Top-k of zero-shot classification, per class, and a picture of what is taken for what."""
    from vlm.tasks.confusion import confusion_picture
    from vlm.tasks.evaluate import evaluate_zero_shot

    log_warnings()
    check_output(out, folder=True)
    depths, sentences = _depths(top_k), read_templates(templates)
    source, labels, keep = _task(data, labels_from, no_flags)
    report = evaluate_zero_shot(
        load_model(model, device), source, labels, templates=sentences, depths=depths, keep=keep
    )
    rows = [(f"top-{k}", percent(figure.as_dict()), f"{100 * figure.chance:.2f}") for k, figure in report.top.items()]
    sizes = f"{counted(len(report.truth), 'picture')}, {counted(len(report.labels), 'label')}"
    typer.echo(f"{report.model} on {report.data}: {sizes}")
    for reason, count in report.left_out.items():
        if count:
            typer.echo(f"not counted: {count} ({reason})")
    typer.echo(table(["measure", "% [95 % interval]", "chance %"], rows))
    if out is not None:
        _write_json(out / "report.json", report.as_dict() | {"template_set": templates, "flags": not no_flags})
        classes = report.per_class()
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(classes[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(classes)
        write_text(buffer.getvalue(), out / "per_class.csv")
        confusion_picture(report.labels, report.truth, report.predicted, out / "confusion.png", title=report.data)
    _complete(source)


@app.command()
def retrieval(
    data: Data,
    model: Model = DEFAULT_MODEL,
    distractors: Annotated[str, typer.Option(help="More pictures to fill the gallery, never asked for.")] = "",
    gallery: Annotated[int, typer.Option(min=2, help="Pictures and texts that a query is searched among.")] = 500,
    galleries: Annotated[int, typer.Option(min=0, help="Galleries at most; 0 for all that the data fill.")] = 0,
    rerank: Annotated[int, typer.Option(min=0, help="Nearest candidates that ITM scores again; 0 for none.")] = 0,
    score: Annotated[str, typer.Option(help="Of re-ranked pairs: itm, or itm+itc (adds the cosine).")] = "itm",
    seed: Annotated[int, typer.Option(help="Draws the galleries and the bootstrap.")] = 0,
    out: Out = None,
    device: Device = "auto",
) -> None:
    """Recall at 1, 5 and 10, pictures by text and texts by picture; with --rerank, before and after it.

    A model that only judges pairs (ViLT) runs all of them whole: the gallery's size squared, for each gallery.
    """
    from vlm.data.sources import open_source
    from vlm.tasks.rerank import check_rerank
    from vlm.tasks.retrieval import evaluate_retrieval

    log_warnings()
    check_output(out, folder=True)
    by = check_rerank(rerank, score)
    source = open_source(data)
    more = open_source(distractors) if distractors else None
    loaded = load_model(model, device)
    advice = "" if loaded.can("encode_image") else f", each whole: a smaller --gallery than {gallery} has fewer"
    report = evaluate_retrieval(
        loaded, source, distractors=more, gallery=gallery, galleries=galleries,
        rerank=rerank, score=by, seed=seed, progress=pair_progress(advice),
    )  # fmt: skip
    header = ["direction", "measure", f"by {report.score}, % [95 % interval]", "chance %"]
    rows = [
        [way.replace("_", " "), f"R@{k}", percent(figure.as_dict()), f"{100 * figure.chance:.2f}"]
        for way, at in report.recall.items()
        for k, figure in at.items()
    ]
    typer.echo(
        f"{report.model} on {report.data}: {counted(report.queries, 'query', 'queries')} each way, "
        f"{counted(report.galleries, 'gallery', 'galleries')} of {report.gallery}"
    )
    if report.gallery < gallery:
        typer.echo(f"the data fills no gallery of {gallery}; --distractors adds pictures to search among", err=True)
    pairs, again = report.pairs, report.reranked
    if again is not None:
        pairs = again.pairs
        header.insert(3, f"{again.k} re-ranked by {again.score}, %")
        for row, figure in zip(rows, (f for at in again.recall.values() for f in at.values()), strict=True):
            row.insert(3, percent(figure.as_dict()))
    if pairs:
        typer.echo(f"pairs run: {pairs}")
    typer.echo(table(header, rows))
    if out is not None:
        _write_json(out / "report.json", report.as_dict() | {"distractors": distractors, "seed": seed})
    _complete(source, more)


@app.command()
def matching(
    data: Data,
    model: Model = DEFAULT_MODEL,
    seed: Annotated[int, typer.Option(help="Draws the foreign texts and the bootstrap.")] = 0,
    out: Out = None,
    device: Device = "auto",
) -> None:
    """Whether ITM tells each picture's own text from that of another picture."""
    from vlm.data.sources import open_source
    from vlm.tasks.matching import evaluate_matching

    log_warnings()
    check_output(out, folder=True)
    source = open_source(data)
    report = evaluate_matching(load_model(model, device), source, seed=seed)
    rows = [
        ["pairs called right", percent(report.accuracy.as_dict()), "50"],
        ["own text above the foreign one", percent(report.order.as_dict()), "50"],
    ]
    typer.echo(f"{report.model} on {report.data}: {counted(report.order.count, 'picture')}, each with two texts")
    typer.echo(table(["measure", "% [95 % interval]", "chance %"], rows))
    if out is not None:
        _write_json(out / "report.json", report.as_dict() | {"seed": seed})
    _complete(source)


@app.command()
def prompts(
    data: Data,
    model: Model = DEFAULT_MODEL,
    labels_from: LabelsFrom = "auto",
    sets: Annotated[str, typer.Option(help="Template sets joined by commas; the first is compared with.")] = (
        "none,drawing,drawings,imagenet"
    ),
    top_k: TopK = "1,5",
    no_flags: NoFlags = False,
    out: Out = None,
    device: Device = "auto",
) -> None:
    """Bare label, one template and ensembles of them, with the paired difference from the first."""
    from vlm.tasks.evaluate import compare_templates
    from vlm.tasks.templates import resolve_templates

    log_warnings()
    check_output(out, folder=True)
    depths = _depths(top_k)
    names = list(dict.fromkeys(name.strip() for name in sets.split(",") if name.strip()))
    for name in names:
        resolve_templates(name)
    source, labels, keep = _task(data, labels_from, no_flags)
    loaded = load_model(model, device)
    found = compare_templates(loaded, source, labels, names, depths=depths, keep=keep)
    header, rows = ["templates", "count"], [[row["templates"], row["count"]] for row in found]
    for k in depths:
        header += [f"top-{k} %", f"against {names[0]}"]
        for cells, row in zip(rows, found, strict=True):
            cells += [percent(row[f"top-{k}"]), percent(row[f"top-{k} against {names[0]}"])]
    typer.echo(table(header, rows))
    if out is not None:
        values = {"model": loaded.name, "data": source.name, "flags": not no_flags, "rows": found}
        _write_json(out / "report.json", values)
    _complete(source)


@app.command()
def pointing(
    data: Data,
    model: Model = DEFAULT_MODEL,
    collages: Annotated[int, typer.Option(min=1, help="Collages of four pictures to play on.")] = 200,
    method: Method = "auto",
    layer: Layer = 0,
    control: Annotated[bool, typer.Option(help="Let the same architecture with random weights play too.")] = True,
    seed: Annotated[int, typer.Option(help="Draws the collages, the control's weights and the bootstrap.")] = 0,
    out: Out = None,
    device: Device = "auto",
) -> None:
    """The pointing game: is the heat of a text in the right one of four pictures? A guess is, a quarter of the time."""
    from vlm.data.sources import open_source
    from vlm.tasks.pointing import evaluate_pointing

    log_warnings()
    check_output(out, folder=True)
    source = open_source(data)
    report = evaluate_pointing(
        load_model(model, device), source, count=collages, method=method, layer=layer, control=control, seed=seed
    )
    sides = [("trained", report.trained), *([("random weights", report.control)] if report.control else [])]
    rows = [
        (name, percent(found.hits.as_dict()), percent(found.heat.as_dict()), f"{100 * found.hits.chance:.0f}")
        for name, found in sides
    ]
    typer.echo(f"{report.model} on {report.data}: {counted(report.trained.hits.count, 'collage')}, {report.method}")
    typer.echo(table(["weights", "hottest patch right, %", "heat in the right picture, %", "chance %"], rows))
    if out is not None:
        _write_json(out / "report.json", report.as_dict())
    _complete(source)


@app.command()
def captions(
    predictions: Annotated[Path, typer.Argument(help="JSON lines or a table: image or key, and caption.")],
    references: Annotated[
        Path | None, typer.Option("--references", "-r", help="JSON lines or a table: image, and one or more captions.")
    ] = None,
    data: Annotated[str, typer.Option("--data", "-d", help="Data whose own captions are the references.")] = "",
    missing: Annotated[
        str, typer.Option(help="Pictures without a caption: error, skip, or empty (scores 0).")
    ] = "error",
    seed: Annotated[int, typer.Option(help="Draws the bootstrap.")] = 0,
    out: Out = None,
) -> None:
    """BLEU-1 to 4, ROUGE-L and CIDEr-D of captions, as `vlm caption` writes them, against references.

    Chance is what the captions get from the references of other pictures.
    """
    from vlm.data.sources import open_source
    from vlm.tasks.caption_report import evaluate_captions, read_predictions, read_references, source_references

    log_warnings()
    check_output(out, folder=True)
    if (references is None) == (not data):
        raise ConfigError("expected either --references FILE or --data DATA")
    own, further = read_predictions(predictions)
    source: Any = open_source(data) if references is None else None
    wanted = source_references(source) if references is None else read_references(references)
    report = evaluate_captions(own, wanted, name=str(predictions), missing=missing, seed=seed)
    typer.echo(f"{report.predictions} against {report.references}: {counted(len(report.pictures), 'picture')}")
    left_out = report.left_out | ({"further captions of one picture": further} if further else {})
    for reason, count in left_out.items():
        typer.echo(f"{count} {reason}")
    rows = [(name, percent(figure.as_dict()), f"{100 * figure.chance:.2f}") for name, figure in report.figures.items()]
    typer.echo(table(["measure", "x 100 [95 % interval]", "chance x 100"], rows))
    if out is not None:
        _write_json(out / "report.json", report.as_dict() | {"left_out": left_out, "missing": missing, "seed": seed})
        lines = [json.dumps(picture, ensure_ascii=False) for picture in report.pictures]
        write_text("\n".join(lines) + "\n", out / "per_picture.jsonl")
    _complete(source)


def _complete(*sources: Any) -> None:
    """Leave with status 1 when pictures of a source could not be read; each was named as it was met."""
    unread = sum(source.problems.unread for source in sources if source is not None)
    if unread:
        typer.echo(
            f"{counted(unread, 'picture')} (or ends of shards) could not be read; the figures are without them",
            err=True,
        )
        raise typer.Exit(1)


def _depths(text: str) -> list[int]:
    """``1,5`` as numbers, each once, smallest first."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--top-k {text!r}: expected numbers of at least 1 joined by commas, such as 1,5")
    return sorted({int(part) for part in parts})


def _task(data: str, labels_from: str, no_flags: bool) -> tuple[Any, Any, list[str] | None]:
    """Source, labels, and the concepts that count (None for all)."""
    from vlm.apps.common import read_lines
    from vlm.data.sources import labels_table, open_source

    source = open_source(data)
    metas = [source.meta(number) for number in range(len(source))]
    emoji = all("emoji" in meta for meta in metas)
    labels: Any
    if labels_from == "emoji" or (labels_from == "auto" and emoji):
        labels = labels_table()
    elif labels_from in ("auto", "data"):
        labels = list(dict.fromkeys(" ".join(str(meta.get("name") or meta["captions"][0]).split()) for meta in metas))
    else:
        labels = read_lines(Path(labels_from), "labels")
    if not no_flags:
        return source, labels, None
    if not emoji:
        raise ConfigError(f"--no-flags: {source.name} isn't an emoji set, so it has no flags to leave out; drop it")
    return source, labels, [label.concept for label in labels_table() if not label.flag]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", path)
