"""``vlm capfilt``: a captioner and a filter rewrite a noisy set of pictures with texts."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm.apps.common import search_config, with_options
from vlm.errors import ConfigError, counted

if TYPE_CHECKING:
    from vlm.tasks.capfilt.run import Result

app = typer.Typer(help="Rewrite a noisy set of pictures with texts (BLIP's CapFilt).", no_args_is_help=True)
SOURCE = "Shards, folder, table or built-in name; may be given again."


def _option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, **more)


@app.callback()
def _group() -> None:
    """Rewrite a noisy set of pictures with texts (BLIP's CapFilt)."""


@dataclass(frozen=True)
class CapfiltOptions:
    """Options of ``vlm capfilt run``."""

    web: Annotated[list[str], _option(f"Noisy set. {SOURCE}", "--web")]
    human: Annotated[list[str], _option(f"Set with good texts. {SOURCE}", "--human")]
    out: Annotated[Path, _option("Folder of the result; a second run goes on where the first one stopped.", "--out")]
    model: Annotated[str, _option("The pre-trained MED: name, folder, repo id or file.", "--model", "-m")] = ""
    captioner: Annotated[str, _option("A captioner fine-tuned already, instead of one made here.")] = ""
    judge: Annotated[str, _option("A filter fine-tuned already, instead of one made here.", "--filter")] = ""
    judged: Annotated[str, _option("An earlier --out: its texts and scores are taken, and no model runs.")] = ""
    synthetic: Annotated[bool, _option("Whether the captioner writes texts.")] = True
    filtering: Annotated[bool, _option("Whether texts that don't match are dropped.")] = True
    threshold: Annotated[float, _option("Texts are kept above this matched probability.")] = 0.5
    strategy: Annotated[str, _option("nucleus, beam or greedy.")] = "nucleus"
    beams: Annotated[int | None, _option("Texts that beam search follows at once. [3]")] = None
    top_p: Annotated[float | None, _option("Probability that nucleus sampling draws from. [0.9]")] = None
    max_new_tokens: Annotated[int, _option("Longest synthetic text, in tokens.")] = 20
    min_new_tokens: Annotated[int, _option("Shortest synthetic text, in tokens.")] = 5
    web_field: Annotated[str, _option("JSON field with the text as found; else the captions.")] = "web"
    seed: Annotated[int, _option("Of all draws.")] = 0
    shard_samples: Annotated[int, _option("Pictures of a shard, the most that a kill loses.")] = 1000
    check: Annotated[list[str] | None, _option("Set to measure the filter on. [the human one]", "--check")] = None
    check_pictures: Annotated[int, _option("Pictures of it at most.")] = 1000
    captioner_config: Annotated[str, _option("BLIP configuration of the captioner's tuning, or YAML.")] = "caption-tiny"
    filter_config: Annotated[str, _option("BLIP configuration of the filter's tuning, or YAML.")] = "filter-tiny"
    config: Annotated[str, _option("BLIP configuration of the new model: tiny, base, or YAML.")] = "tiny"
    tune: Annotated[list[str] | None, _option("KEY=VALUE for both tunings, such as train.epochs=3.", "--tune")] = None
    pretrain: Annotated[list[str] | None, _option("KEY=VALUE for the new model.", "--pretrain")] = None
    train: Annotated[bool, _option("Whether to train a new model on the result.", "--train/--no-train")] = True
    engine: Annotated[str, _option("local, or ray for actors of Ray Data.")] = "local"
    address: Annotated[str, _option("Of a Ray cluster; empty for one on this machine.")] = ""
    actors: Annotated[int, _option("Ray actors, each with both models.")] = 1
    actor_gpus: Annotated[float, _option("GPUs of each actor.")] = 0.0
    batch_size: Annotated[int, _option("Pictures that run at once.")] = 32
    workers: Annotated[int, _option("Processes that decode; 0 decodes where the models run.")] = 0
    device: Annotated[str, _option("auto, cpu, cuda or cuda:N.")] = "auto"
    threads: Annotated[int, _option("CPU threads of torch; 0 for its own choice.", min=0)] = 0


@app.command()
@with_options(CapfiltOptions)
def run(options: CapfiltOptions) -> None:
    """Fine-tune captioner and filter, caption and filter the web set, write shards and a report, train a new model.

    Exit status 1 when some pictures could not be read; the report names them.
    """
    from tqdm import tqdm

    from vlm.apps.train import evaluation, log_to_terminal
    from vlm.tasks.capfilt.run import run_capfilt
    from vlm.train.distributed import ranks

    log_to_terminal()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    config, how = _settings(options)
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"{options.out}: is a file, expected a folder to write into")
    with tqdm(unit=" pictures", disable=None, file=sys.stderr, dynamic_ncols=True) as bar:

        def told(done: int, total: int) -> None:
            bar.total = total
            if bar.n == 0 and done:  # made before: no part of the rate
                bar.initial = done
            bar.update(done - bar.n)

        with ranks(options.device) as here:
            result = run_capfilt(
                config, options.out, here, how=how, pretrain=options.train, evaluation=evaluation, progress=told
            )
    _tell(result, options)


def _settings(options: CapfiltOptions) -> tuple[Any, Any]:
    from vlm.tasks.capfilt.settings import CapfiltConfig, Execution

    generation = search_config(vars(options))
    names = ("model", "captioner", "judge", "judged", "synthetic", "filtering", "threshold", "web_field", "seed")
    given: dict[str, Any] = {name: getattr(options, name) for name in names}
    given |= {"captioner_training": options.captioner_config, "judge_training": options.filter_config}
    config = CapfiltConfig(
        tuple(options.web), tuple(options.human), generation=generation, shard_samples=options.shard_samples,
        check=tuple(options.check or ()), check_pictures=options.check_pictures, training=options.config,
        tune=tuple(options.tune or ()),
        pretrain=tuple(options.pretrain or ()), **given,
    )  # fmt: skip
    execution = ("engine", "address", "actors", "actor_gpus", "batch_size", "workers", "device")
    return config, Execution(**{name: getattr(options, name) for name in execution})


def _tell(result: Result, options: CapfiltOptions) -> None:
    out = options.out
    for name, found in result.report["texts"].items():
        typer.echo(f"{name}: kept {found['kept']} of {counted(found['texts'], 'text')}")
    bare = result.report["pictures"]["web"]["without_text"]
    if bare:
        typer.echo(f"web: {counted(bare, 'picture')} came without a text to judge")
    check = result.report["filter"]
    typer.echo(
        f"filter on exchanged texts: precision {check['precision']['value']:.3f}, recall {check['recall']['value']:.3f}"
    )
    typer.echo(f"shards: {result.data}; report: {out / 'report.html'}")
    if result.model is not None:
        typer.echo(f"the new model is in {result.model}")
    else:
        command = ["vlm", "train", "blip", "--config", options.config, "--data", str(result.data)]
        command += ["--out", str(out / "pretrained"), *(options.pretrain or ())]
        typer.echo(f"train a new model on it: {shlex.join(command)}")
    lost = sum(found["unreadable"] for found in result.report["pictures"].values())
    if lost:
        typer.echo(f"{counted(lost, 'picture')} could not be read; {out / 'report.json'} names them", err=True)
        raise typer.Exit(1)
