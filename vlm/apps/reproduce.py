"""``vlm reproduce``: papers' ablations in miniature, each one resumable command."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.apps.common import Device, write_text

app = typer.Typer(help="Repeat a paper's ablation in miniature.", no_args_is_help=True)

TABLE = "table"
"""Name of the results in the folder of the runs."""

Seeds = Annotated[str, typer.Option(help="Seeds joined by commas; at least three for an interval that says much.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of torch; 0 for its own choice.")]
Runs = Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs; finished ones aren't made again.")]
Table = Annotated[
    Path | None,
    typer.Option(
        "--table",
        help="Write the results as FILE.json and FILE.md, else as OUT/table; those that stand there aren't made again.",
    ),
]


@app.callback()
def _group() -> None:
    """Repeat a paper's ablation in miniature."""


@app.command()
def albef(
    out: Runs = Path("runs/reproduce-albef"),
    seeds: Seeds = "0,1,2",
    noise: Annotated[str, typer.Option(help="Shares of shuffled captions, joined by commas.")] = "0,0.2,0.4",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each run.")] = 120,
    precision: Precision = "auto",
    table: Table = None,
    threads: Threads = 0,
    device: Device = "auto",
) -> None:
    """ITM + MLM; + ITC; + hard negatives; + MoD, each with shuffled captions (ALBEF, table 1)."""
    from vlm.tasks.reproduce.albef import MEASURES, reproduce_albef
    from vlm.tasks.reproduce.grid import as_table

    run = partial(
        reproduce_albef, out, noise=_numbers(noise, "--noise"), steps=steps, precision=precision, device=device
    )
    _repeat(run, partial(as_table, measures=MEASURES), seeds=seeds, place=table or out / TABLE, threads=threads)


@app.command()
def blip(
    out: Runs = Path("runs/reproduce-blip"),
    seeds: Seeds = "0,1,2",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each model that is compared.")] = 100,
    tune_steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of captioner and filter each.")] = 60,
    start: Annotated[str, typer.Option(help="Model of the stage before, which all models begin as.")] = "tiny-albef",
    precision: Precision = "auto",
    table: Table = None,
    threads: Threads = 0,
    device: Device = "auto",
) -> None:
    """CapFilt: neither, filter, captioner, both; nucleus or beam; and what is shared (BLIP, tables 1 to 3)."""
    from vlm.tasks.reproduce.blip import MEASURES, Sizes, reproduce_blip
    from vlm.tasks.reproduce.grid import as_table

    run = partial(reproduce_blip, out, sizes=Sizes(steps, tune_steps), start=start, precision=precision, device=device)
    _repeat(run, partial(as_table, measures=MEASURES), seeds=seeds, place=table or out / TABLE, threads=threads)


@app.command()
def blip2(
    out: Runs = Path("runs/reproduce-blip2"),
    seeds: Seeds = "0,1,2",
    steps: Annotated[str, typer.Option(help="Optimiser steps of stage 1 and of stage 2.")] = "200,200",
    batch: Annotated[str, typer.Option(help="Samples of a step of stage 1 and of stage 2.")] = "64,64",
    captioned: Annotated[int, typer.Option(min=0, help="Test pictures that are captioned; 0 for all.")] = 0,
    start: Annotated[
        list[str] | None,
        typer.Option(help="What image encoder and Q-Former begin as, later ones over earlier; tiny-clip and minilm."),
    ] = None,
    precision: Precision = "auto",
    table: Table = None,
    threads: Threads = 0,
    device: Device = "auto",
) -> None:
    """Stage 2 with and without stage 1, stage 1 with and without ITG (BLIP-2, figure 5 and table 6)."""
    from vlm.tasks.reproduce.blip2 import COLUMN, COUNTS, MEASURES, STARTS, Sizes, reproduce_blip2
    from vlm.tasks.reproduce.grid import as_table

    sizes = Sizes(*_two(steps, "--steps"), *_two(batch, "--batch"), captioned)
    run = partial(reproduce_blip2, out, sizes=sizes, start=start or STARTS, precision=precision, device=device)
    shown = partial(as_table, measures=MEASURES, column=COLUMN, counts=COUNTS)
    _repeat(run, shown, seeds=seeds, place=table or out / TABLE, threads=threads)


def _repeat(
    run: Callable[..., list[dict[str, Any]]],
    shown: Callable[[list[dict[str, Any]]], str],
    *,
    seeds: str,
    place: Path,
    threads: int,
) -> None:
    """Run a grid, and write the results so far to `place` whenever there are more. shown: their table."""
    import torch

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if threads:
        torch.set_num_threads(threads)
    numbers = [int(seed) for seed in _numbers(seeds, "--seeds", whole=True)]
    results = run(seeds=numbers, known=_known(place), after=lambda found: _write(found, shown(found), place))
    typer.echo(shown(results))


def _known(table: Path) -> list[dict[str, Any]]:
    """Results of an earlier call, which may have run elsewhere. Raises DataError when they can't be read."""
    from vlm.tasks.reproduce.grid import read_results

    path = table.with_name(table.name + ".json")
    return read_results(path) if path.is_file() else []


def _write(results: list[dict[str, Any]], text: str, table: Path) -> None:
    from vlm.tasks.reproduce.grid import table_values

    values = {"command": shlex.join(["vlm", *sys.argv[1:]]), **table_values(results)}
    write_text(json.dumps(values, indent=1) + "\n", table.with_name(table.name + ".json"))
    write_text(text, table.with_name(table.name + ".md"))


def _numbers(text: str, option: str, *, whole: bool = False) -> list[float]:
    from vlm.errors import ConfigError

    try:
        return [int(part) if whole else float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        expected = "whole numbers" if whole else "numbers"
        raise ConfigError(f"{option} {text!r}: expected {expected} joined by commas, such as 0,1,2") from error


def _two(text: str, option: str) -> tuple[int, int]:
    """The numbers of stage 1 and of stage 2."""
    from vlm.errors import ConfigError

    found = [int(number) for number in _numbers(text, option, whole=True)]
    if len(found) != 2:
        raise ConfigError(
            f"{option} {text!r}: expected two numbers, that of stage 1 and that of stage 2, such as 64,32"
        )
    return found[0], found[1]
