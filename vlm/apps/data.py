"""``vlm data``: build the repository's own set, check anyone's."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from vlm.errors import counted

SECONDS = 30.0
"""From one line of progress to the next, where there is no terminal for a bar."""
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
    typer.echo(f"{manifest['bytes']:,} bytes in {counted(len(manifest['shards']), 'shard')} under {out}")


@app.command()
def features(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the features; goes on with a part of them.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, as for vlm train.")
    ] = None,
    config: Annotated[str, typer.Option("--config", help="tiny, base, or a YAML file: the run to come.")] = "tiny",
    stage: Annotated[str, typer.Option(help="Stage of that run, one with a frozen image encoder.")] = "blip2",
    data: Annotated[list[str] | None, typer.Option("--data", help="Training set, as for vlm train.")] = None,
    start: Annotated[list[str] | None, typer.Option("--start", help="Weights to begin with, as for vlm train.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Keep 16-bit numbers: half the room, nearly the same.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that run at once.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Compute once what a frozen image encoder makes of a training set; train on it with features=FOLDER."""
    from tqdm import tqdm

    from vlm.train.config import load_config, named_config
    from vlm.train.distributed import pick_device
    from vlm.train.features import compute_features
    from vlm.train.run import begun_network, make_transform, run_kind

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    changes = list(overrides or [])
    changes += [f"{name}={json.dumps(values)}" for name, values in (("data", data), ("start", start)) if values]
    settings = load_config(run_kind(stage), named_config(stage, config), changes)
    network, transform = begun_network(settings), make_transform(settings)
    said = -SECONDS
    with tqdm(unit="pictures", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, samples: int) -> None:
            nonlocal said
            bar.total = samples
            bar.update(done - bar.n)
            if bar.disable and time.monotonic() - said > SECONDS:
                said = time.monotonic()
                typer.echo(f"{done:,} of {samples:,} pictures", err=True)

        store = compute_features(
            network, transform, settings.data, out, device=pick_device(device), kind="float16" if half else "float32",
            batch_size=batch_size, workers=workers, progress=show,
        )  # fmt: skip
    samples, states, width = store.shape
    size = sum(path.stat().st_size for path in out.glob("*.bin"))
    typer.echo(f"{counted(samples, 'picture')} as {states} x {width}, {size:,} bytes in {out}")
    if store.unreadable():
        typer.echo(f"{counted(store.unreadable(), 'picture')} can't be decoded; vlm data check lists them")
    typer.echo(f"train on them with: vlm train {stage} features={out} loader.augment={{}}")


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
