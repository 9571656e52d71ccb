"""``vlm explain``: a picture of where a model looks for each word of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm.apps.common import DEFAULT_MODEL, Device, Model, check_output, load_model, log_warnings
from vlm.errors import ConfigError, counted

Method = Annotated[
    str,
    typer.Option(
        help="grad-cam (ALBEF), plan (ViLT), cam, relevance or rollout (CLIP); auto for the first that the model has. "
        "tiny-albef points better by cam than by grad-cam: in 47 and 28 of 100 collages of four (chance 25)."
    ),
]
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Of the picture that is written, by the file's ending."""
Layer = Annotated[int, typer.Option(min=0, help="Of the fusion layers, from 1, for grad-cam alone; 0: the middle.")]


def explain(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    text: Annotated[str, typer.Argument(help="What to look for, such as 'a red apple'.")],
    model: Model = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write: .png, .jpg or .webp.")] = Path(
        "explanation.png"
    ),
    method: Method = "auto",
    layer: Layer = 0,
    device: Device = "auto",
) -> None:
    """Write a picture of where the model looks for a text and for each of its words."""
    from vlm.data.images import load_image
    from vlm.files import write_file
    from vlm.tasks import explain as task
    from vlm.tasks.heat import methods

    log_warnings()
    check_output(out, inputs=[image])
    form = FORMATS.get(out.suffix.lower())
    if form is None:
        raise ConfigError(f"--out {out}: a picture's name must end in {', '.join(FORMATS)}")
    picture = load_image(image)
    loaded = load_model(model, device)
    found = task.explain(loaded, picture, text, method=method, layer=layer)
    page = task.explanation_picture(loaded, picture, found)
    write_file(out, lambda file: page.save(file, form))
    typer.echo(
        f"{out}: {loaded.name}, {found.method}" + (f", {counted(len(found.words), 'word')}" if found.words else "")
    )
    others = [name for name in methods(loaded) if name != found.method]
    if method == "auto" and others:
        typer.echo(
            f"chosen by itself; --method has also {', '.join(others)}: `vlm eval pointing` says which point best"
        )
