"""``vlm caption``: what pictures show, for files, folders, globs, shards or a list; goes on where it stopped."""

from __future__ import annotations

import glob
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.apps.caption_beside import Beside
from vlm.apps.caption_files import FORMS, Journal, Sink, Terminal
from vlm.apps.classify import finish
from vlm.apps.common import (
    DEFAULT_CAPTIONER,
    check_output,
    find_pictures,
    load_model,
    pictures_in,
    search_config,
    with_options,
)
from vlm.errors import ConfigError, DataError, counted, nearest


def _option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, **more)


@dataclass(frozen=True)
class CaptionOptions:
    """Options of ``vlm caption``; None is what `vlm.generate.GenerationConfig` has."""

    paths: Annotated[list[str], typer.Argument(help="Files, folders, globs, shards, or - for a list on stdin.")]
    model: Annotated[str, _option("Shipped name, folder, repo id or file.", "--model", "-m")] = DEFAULT_CAPTIONER
    prompt: Annotated[str, _option("How each caption begins; empty for the model's own way.")] = ""
    strategy: Annotated[str | None, _option("beam, greedy or nucleus. [beam]")] = None
    beams: Annotated[int | None, _option("Texts that beam search follows at once. [3]")] = None
    sequences: Annotated[int | None, _option("Captions for each picture. [1]", "--sequences", "-n")] = None
    max_new_tokens: Annotated[int | None, _option("Longest caption, in tokens. [20]")] = None
    min_new_tokens: Annotated[int | None, _option("Shortest caption, in tokens. [0]")] = None
    repetition_penalty: Annotated[float | None, _option("Above 1: words that were there are less likely. [1]")] = None
    no_repeat_ngram: Annotated[int | None, _option("No run of so many tokens comes twice; 0 for any. [0]")] = None
    length_penalty: Annotated[float | None, _option("Above 0: longer captions win among beams. [1]")] = None
    top_p: Annotated[float | None, _option("Probability that nucleus sampling draws from. [0.9]")] = None
    top_k: Annotated[int | None, _option("Most tokens that it draws from; 0 for any number. [0]")] = None
    temperature: Annotated[float | None, _option("Logits are divided by it in nucleus sampling. [1]")] = None
    seed: Annotated[int, _option("Of nucleus sampling; a picture's caption depends on it alone.")] = 0
    form: Annotated[str, _option("jsonl, csv, or txt: a file beside each picture.", "--format", "-f")] = "jsonl"
    output: Annotated[Path | None, _option("A file instead of the terminal.", "--output", "-o")] = None
    fresh: Annotated[bool, _option("Caption also what has captions there already.", "--fresh")] = False
    overwrite: Annotated[bool, _option("For txt: replace texts that vlm didn't write.", "--overwrite")] = False
    batch_size: Annotated[int, _option("Pictures that run at once.", min=1)] = 16
    device: Annotated[str, _option("auto, cpu, cuda or cuda:N.")] = "auto"
    llm: Annotated[str, _option("Where a BLIP-2's language model is, if not where it was.", "--llm")] = ""
    progress: Annotated[bool | None, _option("A bar with rate and remaining time. [on a terminal]")] = None


@with_options(CaptionOptions)
def caption(options: CaptionOptions) -> None:
    """Caption pictures. Exit status 1 when some could not be read, 2 when nothing could be done.

    With --output or --format txt a second run goes on where the first one stopped.
    """
    config = search_config(vars(options))
    pictures = {_name(picture): picture for picture in find_inputs(options.paths)}
    check_output(options.output, inputs={getattr(picture, "tar", picture) for picture in pictures.values()})
    sink = _sink(options, config, list(pictures))
    left = [picture for name, picture in pictures.items() if name not in sink.done and name not in sink.kept]
    failed: list[str] = []
    start = time.perf_counter()
    if left:
        _run(options, config, left, sink, failed)
    sink.close()
    if len(failed) < len(pictures):
        _summarise(sink, len(pictures), len(left), len(failed), time.perf_counter() - start)
    finish(failed, len(pictures))


def find_inputs(places: Sequence[str]) -> list[Any]:
    """Pictures as `find_pictures` finds them, and those in shards (files, globs, braces, or folders, whose pictures
    outside of shards follow).

    Raises DataError where a place holds none.
    """
    from vlm.data.shards import ENDINGS, find_shards, shard_pictures

    found: list[Any] = []
    for place in places:
        if place == "-":
            found += find_inputs([line.strip() for line in sys.stdin if line.strip()])
            continue
        packed = [path for path in glob.glob(os.path.join(glob.escape(place), "*")) if path.endswith(ENDINGS)]
        if place.endswith(ENDINGS) or packed:
            inside: list[Any] = [one for shard in find_shards(place) for one in shard_pictures(shard)]
            inside += pictures_in(place) if packed else []
            if not inside:
                raise DataError(f"{place}: no pictures in these shards")
            found += inside
        else:
            found += find_pictures([place])
    if not found:
        raise DataError("no pictures were named; give files, folders, globs or shards, or - for a list")
    return found


def _sink(options: CaptionOptions, config: Any, names: Sequence[str]) -> Sink:
    if options.form not in FORMS:
        raise ConfigError(f"--format {options.form!r}{nearest(options.form, FORMS)}: expected {', '.join(FORMS)}")
    place = Path(options.model)
    model = str(place.resolve()) if place.exists() else options.model
    settings = {"model": model, "prompt": options.prompt.strip(), **asdict(config), "seed": options.seed}
    if options.form == "txt":
        if options.output is not None:
            raise ConfigError("--format txt writes a file beside each picture: leave --output out")
        return Beside(names, settings, fresh=options.fresh, overwrite=options.overwrite)
    if options.overwrite:
        raise ConfigError(
            f"--overwrite: replaces texts beside pictures (--format txt); --format {options.form} has none"
        )
    if options.output is None:
        return Terminal(options.form)
    return Journal(options.output, options.form, names, settings, fresh=options.fresh)


def _run(options: CaptionOptions, config: Any, pictures: Sequence[Any], sink: Sink, failed: list[str]) -> None:
    from tqdm import tqdm

    from vlm.models.packed import pack_linears
    from vlm.tasks.caption import Captioner

    model = load_model(options.model, options.device, llm=options.llm)
    captioner = Captioner(model, config, prompt=options.prompt, seed=options.seed, batch_size=options.batch_size)
    pack_linears(model.network)
    hidden = None if options.progress is None else not options.progress
    # None hides the bar where stderr is no terminal.
    with tqdm(total=len(pictures), unit=" pictures", disable=hidden, file=sys.stderr, dynamic_ncols=True) as bar:

        def skip(picture: Any, error: Exception) -> None:
            message = str(error) if _name(picture) in str(error) else f"{_name(picture)}: {error}"
            with bar.external_write_mode(file=sys.stderr):
                typer.echo(f"skipped: {message}", err=True)
            failed.append(_name(picture))
            bar.update()

        for picture, found in captioner.caption_each(pictures, on_error=skip):
            sink.add(_name(picture), found)
            bar.update()


def _summarise(sink: Sink, total: int, left: int, failed: int, seconds: float) -> None:
    """On stderr: how many, how long, how repetitive."""
    kept = len(sink.kept)
    before = total - left - kept
    said = f", {before} of them from before (--fresh writes them anew)" if before else ""
    rate = f", {(left - failed) / seconds:.1f} pictures/s" if left > failed else ""
    if kept:
        were, them = ("wasn't", "it") if kept == 1 else ("weren't", "them")
        written = f"{were} written by this command; --overwrite replaces {them}"
        typer.echo(f"kept {counted(kept, 'text')} that {written}", err=True)
    have = f"{total - failed - kept} of {counted(total, 'picture')} {'has' if total == 1 else 'have'} captions"
    typer.echo(
        f"{have}{said}{rate}: "
        f"{sink.summary.length:.1f} words each, "
        f"{100 * sink.summary.repetition:.1f} % of word pairs repeated",
        err=True,
    )


def _name(picture: Any) -> str:
    return str(getattr(picture, "name", picture))
