"""``vlm ask`` and ``vlm chat``: questions about pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.apps.common import DEFAULT_SPEAKER, Device, Model, load_model, log_warnings, read_lines

Llm = Annotated[str, typer.Option("--llm", help="Where the model's language model is, if not where it was.")]
Strategy = Annotated[str, typer.Option(help="greedy, beam (ask only) or nucleus.")]
Longest = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Seed = Annotated[int, typer.Option(min=0, help="Of nucleus sampling.")]


def ask(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    questions: Annotated[list[str], typer.Argument(help="One question or several; each is answered by itself.")],
    model: Model = DEFAULT_SPEAKER,
    strategy: Strategy = "beam",
    max_new_tokens: Longest = 20,
    answers: Annotated[Path | None, typer.Option(help="A file of answers, one a line: choose the likeliest.")] = None,
    seed: Seed = 0,
    llm: Llm = "",
    device: Device = "auto",
) -> None:
    """Answer questions about a picture, one line each: freely, or by the likeliest of --answers (BLIP's and ALBEF's
    question answering).
    """
    from vlm.data.images import load_image
    from vlm.tasks.ask import Asker, check_questions

    log_warnings()
    config = _config(strategy, max_new_tokens)
    choices = None if answers is None else read_lines(answers, "answers")
    check_questions(questions)
    picture = load_image(image)  # before a model is read for it
    asker = Asker(_loaded(model, device, llm), config, seed=seed)
    if choices is None:
        found = asker.ask(picture, questions)
    else:
        found = [ranked[0].text for ranked in asker.rank(picture, questions, choices)]
    for answer in found:
        typer.echo(answer)


def chat(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    model: Model = DEFAULT_SPEAKER,
    strategy: Strategy = "greedy",
    max_new_tokens: Longest = 60,
    seed: Seed = 0,
    llm: Llm = "",
    device: Device = "auto",
) -> None:
    """Talk about a picture: a question a line, answers as they are written; an empty line or Ctrl-D ends it."""
    from vlm.data.images import load_image
    from vlm.errors import ConfigError
    from vlm.tasks.ask import Chat

    log_warnings()
    if sys.stdin is None:
        raise ConfigError("vlm chat reads questions from standard input, which is closed; vlm ask takes them as words")
    picture = load_image(image)  # before a model is read for it
    talk = Chat(_loaded(model, device, llm), picture, _config(strategy, max_new_tokens), seed=seed)
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        question = sys.stdin.readline().strip()
        if not question:
            return
        _reply(talk, question)


def _reply(talk: Any, question: str) -> None:
    """Answer; where the turns have grown too long for the language model, without them."""
    from vlm.errors import ConfigError

    try:
        talk.say(question, on_text=_show)
    except ConfigError as error:
        if not talk.turns:
            typer.echo(f"vlm: {error}", err=True)
            return
        typer.echo("vlm: no room is left for the turns before; this question begins a new chat", err=True)
        talk.turns.clear()
        _reply(talk, question)
        return
    typer.echo("")


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _config(strategy: str, longest: int) -> Any:
    from vlm.generate import GenerationConfig

    beams = {"beams": 5} if strategy == "beam" else {}
    least = min(1, longest - 1)
    return GenerationConfig(strategy, max_new_tokens=longest, min_new_tokens=least, **beams)  # type: ignore[arg-type]


def _loaded(model: str, device: str, llm: str) -> Any:
    from vlm.tasks.ask import quicken

    loaded = load_model(model, device, llm=llm)
    quicken(loaded)
    return loaded
