"""``vlm doctor``: what is wrong with a training run, and what to do about it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vlm.train.doctor import Run

WRONG = 1


def doctor(
    run: Annotated[Path, typer.Argument(help="Run folder, or its metrics.jsonl.")],
    pictures: Annotated[
        int, typer.Option(min=0, help="Training pictures to decode, spread over the data; 0 for none.")
    ] = 100,
) -> None:
    """Say in words what is wrong with a run: evidence and advice. Exit status 1 when something is, else 0."""
    from vlm.apps.common import log_warnings
    from vlm.train.doctor import diagnose

    log_warnings()
    found = read_run(run, pictures)
    findings = diagnose(found)
    typer.echo(f"{run}: step {found.step}" + (f" of {found.planned}" if found.planned else ""))
    for finding in findings:
        typer.echo(f"{finding.level}: {finding.name}\n  seen: {finding.evidence}\n  do:   {finding.advice}")
    if not any(finding.level == "wrong" for finding in findings):
        typer.echo("healthy: nothing wrong was found")
        return
    raise typer.Exit(WRONG)


def read_run(run: Path, pictures: int = 0) -> Run:
    """What a run folder (or a metrics file alone) tells.

    pictures: how many training pictures to decode. Raises ConfigError when there are no metrics there.
    """
    from vlm.errors import ConfigError, reason
    from vlm.train.config import read_yaml
    from vlm.train.doctor import Run
    from vlm.train.metrics import read_metrics

    folder, path = (run, run / "metrics.jsonl") if run.is_dir() else (run.parent, run)
    try:
        lines = [line for line in read_metrics(path) if isinstance(line, dict) and "step" in line]
        _check_lines(lines, path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({reason(error)}); expected the folder of a training run") from error
    if not lines:
        begun = (folder / "config.yaml").is_file()
        what = "the run hasn't logged a step yet (train.log_every); if it was stopped, go on with --resume"
        raise ConfigError(
            f"{path}: no line of metrics in it; {what if begun else 'expected the metrics.jsonl of a training run'}"
        )
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    manifest = _manifest(folder / "manifest.json")
    words = manifest.get("command") or []
    stage = words[words.index("train") + 1] if "train" in words[:-1] else "STAGE"
    unreadable, tried = _try_pictures(config, pictures)
    return Run(
        lines,
        config,
        planned=_planned(config, int(manifest.get("samples", 0))),
        finished=(folder / "model").is_dir(),
        silent=max(0.0, time.time() - path.stat().st_mtime),
        resume=f"vlm train {stage} --out {folder} --resume",
        unreadable=unreadable,
        tried=tried,
    )


def _check_lines(lines: list[dict[str, Any]], path: Path) -> None:
    """Raises ConfigError for a line whose values aren't numbers."""
    from vlm.errors import ConfigError

    for number, line in enumerate(lines, 1):
        wrong = [name for name, value in line.items() if name != "kind" and not isinstance(value, int | float)]
        if wrong:
            raise ConfigError(
                f"{path}, line {number} with a step: {wrong[0]} is {line[wrong[0]]!r}, expected a number; these aren't "
                "the metrics of a training run"
            )


def _manifest(path: Path) -> dict[str, Any]:
    from vlm.errors import ConfigError
    from vlm.weights.files import read_json

    if not path.is_file():
        return {}
    values = read_json(path)
    if not isinstance(values.get("command", []), list):
        raise ConfigError(f"{path}: command: expected a list of words; this is no manifest of a run")
    return values


def _planned(config: dict[str, Any], samples: int) -> int:
    """Steps of the whole run, as the engine counts them; 0 when the folder doesn't tell."""
    import math

    from vlm.data.loader import LoaderConfig, steps_per_epoch
    from vlm.errors import ConfigError, reason

    train, loader = config.get("train"), config.get("loader")
    if not isinstance(train, dict):
        return 0
    try:
        if train.get("steps") or not samples or not isinstance(loader, dict):
            return int(train.get("steps", 0))
        batch_size = int(loader["batch_size"])
        return math.ceil(float(train["epochs"]) * steps_per_epoch(samples, LoaderConfig(batch_size=batch_size)))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"config.yaml: train.steps, train.epochs and loader.batch_size: {reason(error)}") from error


def _try_pictures(config: dict[str, Any], count: int) -> tuple[tuple[str, ...], int]:
    """Messages of what can't be decoded among pictures spread over the training data, and how many were tried."""
    from vlm.data.images import decode_image
    from vlm.data.sources import open_source
    from vlm.errors import DataError

    data = config.get("data")
    if not count or not data:
        return (), 0
    try:
        source = open_source(data if isinstance(data, str) else tuple(data))
    except DataError as error:
        typer.echo(f"the training data isn't at hand, so no picture was tried ({error})", err=True)
        return (), 0
    bad, numbers = [], range(0, len(source), max(1, len(source) // count))
    for number in numbers:
        try:
            sample = source[number]
            decode_image(sample.image, name=sample.key)
        except DataError as error:
            bad.append(str(error))
    return tuple(bad), len(numbers)
