"""The command line: ``vlm``."""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from vlm.apps import ask, capfilt, caption, classify, data, doctor, evaluate, explain, models, reproduce, train
from vlm.apps.serve import command as serve

app = typer.Typer(
    help="Vision-language models, trained stage by stage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="eval")
app.add_typer(capfilt.app, name="capfilt")
app.add_typer(data.app, name="data")
app.add_typer(reproduce.app, name="reproduce")
app.command()(classify.classify)
app.command()(caption.caption)
app.command()(ask.ask)
app.command()(ask.chat)
app.command()(serve.serve)
app.command()(explain.explain)
app.command()(doctor.doctor)
app.command()(models.models)
app.command()(models.export)
app.command()(models.demo)

INTERRUPTED = 130


def _show_version(wanted: bool) -> None:
    if wanted:
        from vlm import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Options before any command."""


def main() -> None:
    """Run a command; an error that the user can mend is shown without a traceback, exit status 2."""
    from vlm.errors import VlmError

    for stream in (sys.stdout, sys.stderr):
        # A file's name or a label may hold letters that the terminal lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="vlm")  # also under `python -m vlm.apps.cli` and torchrun
    except VlmError as error:
        typer.echo(f"vlm: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or "the output"
        typer.echo(f"vlm: {where}: no space left on the device; free some, or write elsewhere", err=True)
        sys.exit(2)
    except Exception as error:
        # By name, since torch may not be loaded.
        if type(error).__name__ not in ("OutOfMemoryError", "MemoryError"):
            raise
        typer.echo(f"vlm: out of memory ({str(error)[:200]}); try a smaller batch size or --device cpu", err=True)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.echo("vlm: stopped; what was written is intact", err=True)
        raise


if __name__ == "__main__":
    main()
