"""``vlm train``: one command per stage."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from vlm.train.clip import ClipRun

app = typer.Typer(help="Train a stage from a configuration.", no_args_is_help=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as train.epochs=5 train.optim.lr=2e-4."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder: configuration, metrics, checkpoints, model.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data", help="Training set: folder, CSV/TSV, JSON lines, shards, or a built-in name; may be given again."
    ),
]


@app.command()
def clip(
    overrides: Overrides = None,
    config: Annotated[
        str | None, typer.Option("--config", help="tiny (if none is named), base, or a YAML file.")
    ] = None,
    out: Out = Path("runs/clip"),
    data: Data = None,
    start: Annotated[
        list[str] | None, typer.Option("--start", help="Weights to begin with: minilm, a model or run folder.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of torch; 0 for its own choice.")] = 0,
) -> None:
    """Train CLIP (ITC). Several GPUs: torchrun --nproc-per-node N -m vlm.apps.cli train clip ..."""
    from vlm.errors import ConfigError
    from vlm.train.clip import ClipRun, read_run_config, train_clip
    from vlm.train.config import load_config, named_config
    from vlm.train.distributed import leave, ranks

    _log_to_terminal()
    if threads:
        import torch

        torch.set_num_threads(threads)
    changes = list(overrides or [])
    changes += [f"data={_listed(data)}"] if data else []
    changes += [f"start={_listed(start)}"] if start else []
    if resume and (config or start):
        raise ConfigError("--resume goes on with the run's own configuration; drop --config and --start")
    if resume:
        settings = read_run_config(out, changes)
    else:
        settings = load_config(ClipRun, named_config("clip", config or "tiny"), changes)
    with ranks(device) as here:
        position = train_clip(
            settings, out, here, resume=resume, evaluate=_evaluation(settings), progress=_interactive()
        )
    if here.first:
        typer.echo(f"trained {position.step} steps; the model is in {out / 'model'}")
    if here.count > 1:
        leave()


def _evaluation(config: ClipRun) -> Callable[[nn.Module], dict[str, float]] | None:
    """Retrieval on the validation sets; None where there are none."""
    if not config.validation:
        return None
    from vlm.data.sources import open_source
    from vlm.tasks.retrieval import evaluate_retrieval
    from vlm.train.clip import make_tokenizer, make_transform
    from vlm.weights.loaded import VisionLanguageModel

    source = open_source(config.validation)
    tokenizer, transform = make_tokenizer(config), make_transform(config)

    def evaluate(network: nn.Module) -> dict[str, float]:
        model = VisionLanguageModel(network, tokenizer, transform, name=config.name, family="clip")
        report: dict[str, Any] = evaluate_retrieval(model, source, gallery=500).figures()
        return report

    return evaluate


def _listed(values: list[str]) -> str:
    """Values as a YAML list, whatever characters they hold."""
    import json

    return json.dumps(values)


def _interactive() -> bool:
    import sys

    return sys.stderr.isatty()


def _log_to_terminal() -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("vlm").setLevel(logging.INFO)
