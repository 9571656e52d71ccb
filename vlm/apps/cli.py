"""The command line: ``vlm``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vlm.apps import classify, data, evaluate, models, train

app = typer.Typer(
    help="Vision-language models, trained stage by stage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="eval")
app.add_typer(data.app, name="data")
app.command()(classify.classify)
app.command()(models.models)
app.command()(models.export)
app.command()(models.demo)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        from vlm import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run a command; an error that the user can mend is shown without a traceback, exit status 2."""
    from vlm.errors import VlmError

    try:
        app()
    except VlmError as error:
        typer.echo(f"vlm: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("vlm: stopped; what was written is intact", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
