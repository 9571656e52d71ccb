"""What several commands share: options, labels, files of pictures, tables, and writing results whole."""

from __future__ import annotations

import dataclasses
import glob
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from vlm import files
from vlm.errors import ConfigError, DataError, WeightsError, counted

if TYPE_CHECKING:
    from vlm.generate import GenerationConfig

DEFAULT_MODEL = "tiny-clip"
DEFAULT_CAPTIONER = "tiny-blip"
DEFAULT_SPEAKER = "tiny-blip2"
STAGES = {DEFAULT_MODEL: "clip", DEFAULT_CAPTIONER: "blip", DEFAULT_SPEAKER: "blip2-llm"}
"""What `vlm train` calls the stage of each."""
Model = Annotated[str, typer.Option("--model", "-m", help="Shipped name, folder, repo id, open_clip:ARCH/TAG, file.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Templates = Annotated[
    str,
    typer.Option(
        "--templates", help="auto, none, single, drawing, drawings, simple, imagenet, a file, or a sentence with {}."
    ),
]
LabelsFile = Annotated[Path | None, typer.Option("--labels-file", help="A file with one label a line.")]


def load_model(name: str, device: str, *, llm: str = "", image: Path | None = None) -> Any:
    """The model on its device; llm, image: see `vlm.load`."""
    from vlm.train.distributed import pick_device
    from vlm.weights.load import load
    from vlm.weights.shipped import shipped

    if name in STAGES and not Path(name).exists() and name not in shipped():
        command = f"vlm train {STAGES[name]} --config tiny --out runs/{name}"
        raise WeightsError(
            f"{name} isn't in this checkout; train it with `{command}` and "
            f"give `--model runs/{name}`, or name another model (`vlm models` says which)"
        )
    return load(name, device=pick_device(device), llm=llm, image=image)


def read_labels(labels: str, labels_file: Path | None) -> list[str]:
    """Labels from ``a,b,c`` or from a file with one a line. Raises ConfigError unless exactly one is given."""
    if bool(labels.strip()) == (labels_file is not None):
        problem = "both were given" if labels_file else "none were given"
        raise ConfigError(f"labels: {problem}; name them with --labels cat,dog or --labels-file FILE (one a line)")
    if labels_file is None:
        return [part.strip() for part in labels.split(",")]
    return read_lines(labels_file, "labels")


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that aren't blank. Raises DataError when it can't be read or holds none."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: the {what} can't be read, expected UTF-8 text with one a line; save it as UTF-8"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", "") or error
        raise DataError(f"{path}: the {what} can't be read ({reason})") from error
    if not lines:
        raise DataError(f"{path}: holds no {what}; write one a line")
    return lines


def read_templates(templates: str) -> str | list[str]:
    """A set's name or a sentence as it is; else the lines of a file, where one has that name."""
    from vlm.tasks.templates import NAMES, resolve_templates

    if templates not in NAMES and "{" not in templates and Path(templates).is_file():
        lines = read_lines(Path(templates), "templates")
        resolve_templates(lines)
        return lines
    resolve_templates(templates)
    return templates


def find_pictures(places: Sequence[str]) -> list[str]:
    """Files named by paths, folders (recursive), globs, or ``-`` for a list on standard input; each once.

    A path that isn't there stays in the list, so that it is reported. Raises DataError for a folder or a glob
    without pictures, and when nothing is named.
    """
    found: list[str] = []
    for place in places:
        if not place:
            raise DataError("a picture's path is empty; give files, folders or globs, or - for a list")
        if place == "-":
            here = [line.strip() for line in sys.stdin if line.strip()]
            expected = "standard input: no paths there, expected one a line"
        elif os.path.isdir(place):
            here = pictures_in(place)
            expected = f"{place}: no pictures in this folder, expected files such as .png, .jpg or .webp"
        elif glob.has_magic(place) and not os.path.exists(place):
            here = sorted(path for path in glob.glob(place, recursive=True) if os.path.isfile(path))
            expected = f"{place}: no file matches"
        else:
            here, expected = [place], ""
        if not here:
            raise DataError(expected)
        found += here
    if not found:
        raise DataError("no pictures were named; give files, folders or globs, or - for a list on standard input")
    return list(dict.fromkeys(found))


def pictures_in(folder: str) -> list[str]:
    """Files in a folder, also in those inside it, that end as pictures do, in order."""
    from vlm.data.images import SUFFIXES

    inside = sorted(Path(folder).rglob("*"))
    return [str(path) for path in inside if path.suffix.lower() in SUFFIXES and path.is_file()]


def write_text(text: str, output: Path | None) -> None:
    """To a file, which appears whole, or to the terminal. Raises DataError when it can't be written."""
    if output is None:
        typer.echo(text, nl=not text.endswith("\n"))
        return
    files.write_text(output, text)


def check_output(output: Path | None, *, folder: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Raises ConfigError when results could not be written there, before the work is done.

    inputs: files that are read, none of which the results may replace, by whatever name it is called.
    """
    if output is None:
        return
    if not output.exists():
        above = next((parent for parent in output.absolute().parents if parent.exists()), output)
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise ConfigError(f"{output}: can't be written, since {above} is no folder that you may write in")
        return
    if folder and not output.is_dir():
        raise ConfigError(f"{output}: is a file, expected a folder to write into")
    if not folder and output.is_dir():
        raise ConfigError(f"{output}: is a folder, expected a file to write")
    same = next((one for one in inputs if os.path.exists(one) and os.path.samefile(one, output)), None)
    if same is not None:
        named = f" ({same})" if str(same) != str(output) else ""
        raise ConfigError(f"{output}: is one of the inputs{named}, which the result would replace; name another file")


def pair_progress(advice: str = "") -> Callable[[int, int], None]:
    """Tells on stderr how many pairs a cross-encoder will run, with advice behind it, then their rate and time left."""
    from tqdm import tqdm

    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            typer.echo(f"{counted(total, 'pair')} of a picture and a text to run{advice}", err=True)
            bar = tqdm(total=total, unit=" pairs", disable=None, file=sys.stderr, dynamic_ncols=True)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown, columns aligned."""
    cells = [list(map(str, header)), *([str(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def percent(figure: Mapping[str, float]) -> str:
    """A figure with its interval (``value``, ``low``, ``high``, as shares) in per cent."""
    return f"{100 * figure['value']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def with_options(kind: type, *, environment: str = "") -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Makes a command of one settings object into one for typer: its options are the fields of the dataclass `kind`.

    environment: what the names of variables begin with that set options too; empty for none.
    """

    def make(command: Callable[[Any], None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            command(kind(**values))

        hints = get_type_hints(kind, include_extras=True)
        parameters = []
        for field in dataclasses.fields(kind):
            if environment:
                hints[field.name].__metadata__[0].envvar = environment + field.name.upper()
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            only = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(field.name, only, default=default, annotation=hints[field.name]))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return make


SEARCHES = {
    "beams": "beam", "length_penalty": "beam", "top_p": "nucleus", "top_k": "nucleus", "temperature": "nucleus",
}  # fmt: skip
"""The only search that heeds an option."""


def search_config(given: Mapping[str, Any]) -> GenerationConfig:
    """How texts are searched for, by the options that were given: those of `GenerationConfig`, None where left out.

    Raises ConfigError for a value that can't be, and for an option that the search of this strategy would not heed.
    """
    from vlm.generate import GenerationConfig

    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    values = {name: value for name, value in given.items() if name in names and value is not None}
    config = GenerationConfig(**values)
    for name, strategy in SEARCHES.items():
        if name in values and config.strategy != strategy:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for {strategy} search, and the strategy is {config.strategy}: leave it "
                f"out, or add --strategy {strategy}"
            )
    return config


def log_warnings() -> None:
    """Show the package's warnings on stderr."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
