"""``vlm data``: build the repository's own set, check anyone's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make and check data.", no_args_is_help=True)


@app.command()
def build(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for shards, manifest and licences.")] = Path("data"),
    work: Annotated[Path, typer.Option("--work", help="Folder that keeps fetched packages.")] = Path(".cache/packages"),
    workers: Annotated[int, typer.Option(min=1, help="Processes that draw.")] = 2,
) -> None:
    """Make the repository's own set from public packages (needs npm, apt-get and resvg_py)."""
    from vlm.data.build import build as make

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("vlm.data").setLevel(logging.INFO)
    manifest = make(out, work=work, workers=workers)
    for split, count in manifest["splits"].items():
        typer.echo(f"{split:16} {count:7,}")
    typer.echo(f"{manifest['bytes']:,} bytes in {len(manifest['shards'])} shards under {out}")


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="Folder, CSV/TSV, JSON lines, shards, or a built-in name.")],
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode; 0 for this one alone.")] = 2,
) -> None:
    """Read all of a set and report what is wrong with it; exit status 1 when something is, 2 when it is empty."""
    from vlm.data.check import check_source

    logging.getLogger("vlm.data").setLevel(logging.ERROR)
    report = check_source(data, workers=workers)
    typer.echo(json.dumps(report.as_dict(), indent=1, ensure_ascii=False) if as_json else report.text())
    if not report.ok:
        raise typer.Exit(1)
