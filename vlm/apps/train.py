"""``vlm train``: one command per stage."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from vlm.train.run import RunConfig

app = typer.Typer(help="Train a stage from a configuration.", no_args_is_help=True)

STAGES = {
    "clip": "Train CLIP (ITC).",
    "vilt": "Train ViLT (ITM, MLM, word-patch alignment), from a CLIP's image tower and words.",
    "albef": "Train ALBEF (ITC, ITM, MLM, momentum distillation), from a CLIP.",
    "blip2-llm": "Train BLIP-2's second step (a Q-Former's queries as words for a frozen language model).",
    "blip": "Train BLIP (ITC, ITM, LM with a teacher for ITC), from an ALBEF or a CLIP.",
    "blip2": "Train BLIP-2's first stage (ITC, ITM, ITG of a Q-Former on frozen images), from a CLIP and a BERT.",
}
STARTS = {
    "vilt": "a CLIP's",
    "albef": "a CLIP's",
    "blip": "an ALBEF's or a CLIP's",
    "blip2": "a CLIP's, and given again minilm or a BERT's",
    "blip2-llm": "a first step's (vlm train blip2)",
}
"""Whose weights each stage begins with; CLIP learns from nothing as well."""
SEVERAL = "Several GPUs: torchrun --nproc-per-node N -m vlm.apps.cli train {} ..."

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as train.epochs=5 train.optim.lr=2e-4."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Run folder: configuration, metrics, checkpoints, model; else runs/STAGE."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data", help="Training set: folder, CSV/TSV, JSON lines, shards, or a built-in name; may be given again."
    ),
]


def _command(stage: str) -> Callable[..., None]:
    def train(
        overrides: Overrides = None,
        config: Annotated[
            str | None, typer.Option("--config", help="tiny (if none is named), base, or a YAML file.")
        ] = None,
        out: Out = None,
        data: Data = None,
        start: Annotated[
            list[str] | None,
            typer.Option(
                "--start",
                help="Weights to begin with: minilm, a shipped name, a model or run folder, a BERT or BLIP-2 of "
                "transformers (folder or repo id), an official checkpoint; given again, later ones go over earlier.",
            ),
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
        threads: Annotated[int, typer.Option(min=0, help="CPU threads of torch; 0 for its own choice.")] = 0,
    ) -> None:
        from vlm.errors import ConfigError
        from vlm.train.config import load_config, named_config
        from vlm.train.run import read_run_config, run_kind

        log_to_terminal()
        if threads:
            import torch

            torch.set_num_threads(threads)
        changes = list(overrides or [])
        changes += [f"data={_listed(data)}"] if data else []
        changes += [f"start={_listed(start)}"] if start else []
        if resume and (config or start):
            raise ConfigError("--resume goes on with the run's own configuration; drop --config and --start")
        folder = out or Path("runs") / stage
        if resume:
            settings = read_run_config(stage, folder, changes)
        else:
            settings = load_config(run_kind(stage), named_config(stage, config or "tiny"), changes)
            if not settings.start and stage in STARTS and _first():
                typer.echo(
                    f"{stage}: nothing to start from: all that is trained begins as random numbers; --start takes "
                    f"{STARTS[stage]} model or run folder, or a shipped name",
                    err=True,
                )
        _run(settings, folder, resume, device)

    train.__doc__ = f"{STAGES[stage]} {SEVERAL.format(stage)}"
    return train


for _stage in STAGES:
    app.command(_stage)(_command(_stage))


def _run(settings: RunConfig[Any], out: Path, resume: bool, device: str) -> None:
    from vlm.train.distributed import leave, ranks
    from vlm.train.run import train_stage

    with ranks(device) as here:
        position = train_stage(
            settings, out, here, resume=resume, evaluate=evaluation(settings), progress=sys.stderr.isatty()
        )
    if here.first:
        typer.echo(f"trained {position.step} steps; the model is in {out / 'model'}")
    if here.count > 1:
        leave()


def evaluation(config: RunConfig[Any]) -> Callable[[nn.Module], dict[str, float]] | None:
    """Figures on the validation sets: retrieval by features, matching, and words said; None where there are no sets."""
    if not config.validation:
        return None
    from vlm.data.sources import open_source
    from vlm.tasks.language import evaluate_language
    from vlm.tasks.matching import evaluate_matching
    from vlm.tasks.retrieval import evaluate_retrieval
    from vlm.train.run import make_tokenizer, make_transform
    from vlm.weights.families import family_name
    from vlm.weights.loaded import VisionLanguageModel

    source = open_source(config.validation)
    tokenizer, transform = make_tokenizer(config), make_transform(config)

    def evaluate(network: nn.Module) -> dict[str, float]:
        model = VisionLanguageModel(network, tokenizer, transform, name=config.name, family=family_name(config.model))
        found: dict[str, float] = {}
        if model.can("encode_text"):
            found |= evaluate_retrieval(model, source, gallery=500).figures()
        if model.can("match"):
            found |= evaluate_matching(model, source).figures()
        if model.can("lm_logits"):
            found |= evaluate_language(model, source).figures()
        return found

    return evaluate


def _listed(values: list[str]) -> str:
    """Values as a YAML list, whatever characters they hold."""
    return json.dumps(values)


def log_to_terminal() -> None:
    """Show the package's messages on the first rank's stderr."""
    if _first():
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("vlm").setLevel(logging.INFO)


def _first() -> bool:
    """Whether this is the first of torchrun's processes, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0
