"""A grid of runs: every cell with every seed, each run resumable, each result kept in a file of its own."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError, DataError
from vlm.files import write_text
from vlm.tasks.metrics import mean_interval
from vlm.tasks.reproduce.recipe import override_difference, recipe_difference, recipe_values
from vlm.tasks.reproduce.short import tiny_config
from vlm.train.distributed import ranks
from vlm.train.environment import surroundings
from vlm.train.run import RunConfig, read_run_config, train_stage
from vlm.weights.files import CONFIG

logger = logging.getLogger("vlm.reproduce")

RESULT = "result.json"
PLACE = "surroundings"
"""Of a result: machine and package versions that it was made with."""
WHOLE = "recipe"
"""Of a result: all settings by name, see `recipe_values`."""
LISTED = (PLACE, WHOLE)
"""What many results have in common; a table's file lists each once, and its results give the number."""
REFERENCE = "reference"
"""Of a result: whether its model was only measured, see `vlm.tasks.reproduce.references`."""
Measure = Callable[[Path], dict[str, float]]
"""The folder of a finished run to its figures: shares from 0 to 1, and counts."""


@dataclass(frozen=True)
class Cell:
    """One setting of what is compared."""

    row: str
    """What stands in the table's first column."""
    column: str
    """Which group of columns."""
    changes: tuple[str, ...]
    """Overrides of the recipe, such as ``train.teacher.alpha=0``."""

    @property
    def folder(self) -> str:
        """Name of its runs' folders, before the seed."""
        return folder_name(f"{self.row} {self.column}")


def folder_name(text: str) -> str:
    """The letters and figures of a text, in small letters, with hyphens for what stands between them."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in text.lower())
    return "-".join(part for part in plain.split("-") if part)


def run_grid(
    stage: str,
    cells: Sequence[Cell],
    *,
    seeds: Sequence[int],
    recipe: Sequence[str],
    out: Path,
    measure: Measure,
    prepare: Callable[[Cell, int], Sequence[str]] | None = None,
    prepared: Mapping[str, Any] | None = None,
    known: Sequence[dict[str, Any]] = (),
    after: Callable[[list[dict[str, Any]]], None] | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Train and measure every cell with every seed, seed by seed, so that an early stop leaves whole tables.

    A run that is finished isn't made again, one that was broken off goes on from its checkpoint. Checkpoints of
    finished runs are dropped. recipe: overrides of the stage's `tiny` configuration that all cells share. known:
    results of an earlier call, which needn't lie in `out`; those made with the same settings count as finished.
    after: called whenever a run is finished, with the results so far and the known ones of other cells and seeds.
    prepare: called before a cell's run with the cell and the seed; what it gives are further overrides that depend on
    where things lie, such as ``data=[...]``. prepared: what else that work depends on, by name. Returns the results.
    Raises ConfigError when one in `out` or a known one was made by another recipe, DataError when one can't
    be read.
    """
    whole = recipe_values(stage, recipe, prepared or {})
    _check_known(known, cells, list(recipe), whole)
    found: list[dict[str, Any]] = []
    seeds = list(dict.fromkeys(seeds))
    total = len(cells) * len(seeds)
    for seed in seeds:
        for cell in cells:
            run = out / f"{cell.folder}-seed-{seed}"
            settings = [*recipe, *cell.changes, f"train.seed={seed}"]
            result = _known(known, cell, settings) or _finished(run, settings, whole)
            if result is None:
                logger.info("run %d of %d: %s, %s, seed %d", len(found) + 1, total, cell.row, cell.column, seed)
                places = list(prepare(cell, seed)) if prepare is not None else []
                _train(stage, run, [*settings, *places], device)
                result = {"row": cell.row, "column": cell.column, "seed": seed, "settings": settings}
                result |= {WHOLE: whole, "figures": measure(run), PLACE: surroundings()}
                write_text(run / RESULT, json.dumps(result, indent=1) + "\n", error=DataError)
                shutil.rmtree(run / "checkpoints", ignore_errors=True)
            found.append(result)
            if after is not None:
                after([*found, *(one for one in known if one not in found)])
    return found


def table_values(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The JSON values of a table's file, for `read_results`; results may have been made in several places."""
    lists: dict[str, list[dict[str, Any]]] = {name: [] for name in LISTED}
    rows = []
    for result in results:
        row = dict(result)
        for name in LISTED:
            if name in result:
                if result[name] not in lists[name]:
                    lists[name].append(result[name])
                row[name] = lists[name].index(result[name])
        rows.append(row)
    return {**lists, "results": rows}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in a file: one, or a list called ``results``. Raises DataError when it holds something else.

    In tables written before results knew their places, the place of the last call stands for all.
    """
    kinds = {"row": str, "column": str, "seed": int, "settings": list, "figures": dict}
    try:
        values = json.loads(path.read_text("utf-8"))
        results = values.get("results", [values])
        wrong = [name for one in results for name, kind in kinds.items() if not isinstance(one[name], kind)]
        if "results" in values:
            results = [_placed(one, values) for one in results]
        wrong += [WHOLE for one in results if not isinstance(one.get(WHOLE, {}), dict)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no results of runs in it ({error!r}); choose another file, or delete it") from error
    if wrong:
        raise DataError(f"{path}: {wrong[0]} of a result isn't a {kinds.get(wrong[0], dict).__name__}; delete the file")
    found: list[dict[str, Any]] = results
    return found


def _placed(result: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """A result of a table with what the table lists once."""
    found = result | {name: table[name][result[name]] for name in LISTED if name in result}
    last = {name: table[name] for name in ("packages", "python", "machine") if name in table}
    return found if PLACE in found or not last else found | {PLACE: last}


def _check_known(
    known: Sequence[dict[str, Any]], cells: Sequence[Cell], recipe: list[str], whole: Mapping[str, Any]
) -> None:
    """Raises ConfigError for results that can't stand in one table with those of this call."""
    changes = {(cell.row, cell.column): list(cell.changes) for cell in cells}
    for one in known:
        shared, own = one["settings"][: len(recipe)], one["settings"][len(recipe) : -1]
        now = changes.get((one["row"], one["column"]), own)
        other = override_difference(shared, recipe) or override_difference(own, now) or _difference(one, whole)
        if other:
            raise ConfigError(
                f"the known result of {one['row']!r}, {one['column']!r}, seed {one['seed']} was made with other "
                f"settings ({other}); give the same options, or choose another --table"
            )


def _difference(result: dict[str, Any], whole: Mapping[str, Any]) -> str:
    """What sets a result's recipe apart from the one of this call; empty for none, or where it noted none."""
    return recipe_difference(result.get(WHOLE, {}), whole)


def _known(known: Sequence[dict[str, Any]], cell: Cell, settings: list[str]) -> dict[str, Any] | None:
    """The cell's own result; cells that differ by what was prepared for them have the same settings."""
    own = (cell.row, cell.column, settings)
    return next((one for one in known if (one["row"], one["column"], one["settings"]) == own), None)


def _finished(run: Path, settings: list[str], whole: Mapping[str, Any]) -> dict[str, Any] | None:
    path = run / RESULT
    if not path.is_file():
        return None
    (result,) = read_results(path)
    other = override_difference(result["settings"], settings) or _difference(result, whole)
    if other:
        raise ConfigError(f"{run}: was made with other settings ({other}); choose another --out")
    return result


def train_part(stage: str, run: Path, settings: Sequence[str], device: str) -> Path:
    """Train what cells begin as, once, going on where it was broken off; returns its model's folder.

    Its checkpoints are dropped when it is finished. Raises ConfigError where `run` was begun with other settings.
    """
    model = run / "model"
    if (model / CONFIG).is_file():
        _begun(stage, run, tiny_config(stage, settings))
        return model
    logger.info("training %s", run)
    _train(stage, run, settings, device)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return model


def _train(stage: str, run: Path, settings: Sequence[str], device: str) -> None:
    with ranks(device) as here:
        config = tiny_config(stage, settings)
        begun = _begun(stage, run, config)
        train_stage(begun or config, run, here, resume=begun is not None, progress=False)


def _begun(stage: str, run: Path, config: RunConfig[Any]) -> RunConfig[Any] | None:
    """The settings that a run was begun with, None where none was; raises ConfigError where they are others."""
    if not (run / "config.yaml").is_file():
        return None
    begun = read_run_config(stage, run)
    if _asked(begun) != _asked(config):
        raise ConfigError(f"{run}: was begun with other settings; choose another --out, or delete this folder")
    return begun


def _asked(config: RunConfig[Any]) -> RunConfig[Any]:
    """Settings without what a run adds to them: the hash of its language model."""
    llm = getattr(config.model, "llm", None)
    return config if llm is None else replace(config, model=replace(config.model, llm=replace(llm, sha256="")))


def as_table(
    results: Sequence[dict[str, Any]],
    measures: Mapping[str, str],
    *,
    column: str = "data",
    counts: Mapping[str, str] | None = None,
) -> str:
    """A Markdown table: a line a cell, the mean over seeds in per cent with its 95 % interval (Student's t).

    measures: the figures to show, and how their columns are called. column: how the groups of cells are called.
    counts: figures that are the same for every seed, shown in millions, and how their columns are called. Results of
    reference (`REFERENCE`) have no seeds.
    """
    counts = counts or {}
    cells = dict.fromkeys((result["row"], result["column"]) for result in results)
    lines = ["| " + " | ".join(["setting", column, "seeds", *measures.values(), *counts.values()]) + " |"]
    lines.append("|" + "---|" * (3 + len(measures) + len(counts)))
    for row, group in cells:
        mine = [result for result in results if (result["row"], result["column"]) == (row, group)]
        seeds = "-" if mine[0].get(REFERENCE) else str(len(mine))
        shown = []
        for name in measures:
            values = [100 * one["figures"][name] for one in mine if name in one["figures"]]
            shown.append(_shown(values) if values else "-")
        for name in counts:
            value = mine[0]["figures"].get(name)
            shown.append("-" if value is None else f"{value / 1e6:.1f}")
        lines.append("| " + " | ".join([row, group, seeds, *shown]) + " |")
    return "\n".join(lines) + "\n"


def _shown(values: list[float]) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} [{low:.1f}, {high:.1f}]"
