"""``vlm models``, ``vlm export`` and ``vlm demo``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from vlm.apps.common import DEFAULT_CAPTIONER, DEFAULT_MODEL, Device, LabelsFile, Model, check_output, load_model
from vlm.errors import ConfigError, counted, nearest


def models() -> None:
    """List the models that come with the package, and what else can be loaded."""
    from vlm.weights.load import ACCEPTED
    from vlm.weights.shipped import shipped

    found = shipped()
    for name, line in found.items():
        typer.echo(f"{name}\n  {line}")
    if not found:
        typer.echo("no model is shipped with this checkout")
    typer.echo(f"\nAlso: {ACCEPTED.removeprefix('a shipped name, ')}.")


def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; for --to official a .pth file.")],
    model: Model = DEFAULT_MODEL,
    to: Annotated[
        str,
        typer.Option("--to", help="vlm, hf (transformers), open_clip, or official (ALBEF's, BLIP's or BLIP-2's file)."),
    ] = "hf",
    dtype: Annotated[str, typer.Option(help="Type of the stored numbers: fp32, fp16 or bf16; for --to vlm.")] = "fp32",
    base: Annotated[
        str | None, typer.Option(help="A shipped model whose tensors aren't stored again; for --to vlm.")
    ] = None,
    llm: Annotated[
        str, typer.Option(help="The language model of an official stage-2 BLIP-2: a repo id or folder.")
    ] = "",
    image: Annotated[
        Path | None,
        typer.Option(help="A file with an official BLIP-2's image encoder; eva_vit_g.pth beside it if none."),
    ] = None,
    near: Annotated[
        bool, typer.Option("--near", help="For --to hf: let an official BLIP-2's last image norm have another eps.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Write a model as another library reads it."""
    import torch

    from vlm.weights.export import export_hf, export_open_clip
    from vlm.weights.files import check_target
    from vlm.weights.official import export_official
    from vlm.weights.shipped import base_folder

    kinds = ("vlm", "hf", "open_clip", "official")
    if to not in kinds:
        raise ConfigError(f"--to {to!r}{nearest(to, kinds)}: expected one of {', '.join(kinds)}")
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if dtype not in types:
        raise ConfigError(f"--dtype {dtype!r}{nearest(dtype, types)}: expected one of {', '.join(types)}")
    if to != "vlm" and dtype != "fp32":
        raise ConfigError(f"--dtype {dtype}: --to {to} writes fp32; leave --dtype out, or use --to vlm")
    if to != "vlm" and base is not None:
        raise ConfigError(f"--base {base}: only --to vlm leaves tensors out; leave --base out, or use --to vlm")
    check_output(out, folder=to != "official", inputs=[model])
    if to != "official":
        check_target(out)  # before a model is read
    if base is not None:
        base_folder(base, where="--base")
    if near and to != "hf":
        raise ConfigError(f"--near: only --to hf has such settings; leave it out of --to {to}")
    loaded = load_model(model, device, llm=llm, image=image)
    if to == "vlm":
        loaded.save(out, dtype=types[dtype], base=base)
    else:
        writers: dict[str, Callable[..., Path]] = {
            "hf": partial(export_hf, near=near), "open_clip": export_open_clip, "official": export_official,
        }  # fmt: skip
        writers[to](loaded, out)
    typer.echo(f"{loaded.name} written to {out}")


def demo(
    pictures: Annotated[list[str] | None, typer.Argument(help="Pictures; the repository's examples if none.")] = None,
    labels_file: LabelsFile = None,
    model: Model = DEFAULT_MODEL,
    captioner: Annotated[str, typer.Option(help="What says of each picture what it shows.")] = DEFAULT_CAPTIONER,
    device: Device = "cpu",
) -> None:
    """Classify the repository's example pictures, zero-shot, and caption them, with the models that ship."""
    from vlm.apps.classify import as_table, finish, predictions
    from vlm.apps.common import find_pictures, read_lines, write_text
    from vlm.data.sources import data_dir
    from vlm.tasks.caption import Captioner
    from vlm.tasks.zero_shot import ZeroShotClassifier

    labels = read_lines(labels_file or data_dir() / "examples" / "labels.txt", "labels")
    found = find_pictures(pictures or [str(data_dir() / "examples")])
    loaded = load_model(model, device)
    classifier = ZeroShotClassifier(loaded, labels, "drawings")
    speaker = Captioner(load_model(captioner, device))  # one that can't speak is refused before anything is shown
    typer.echo(
        f"{loaded.name} on {counted(len(found), 'picture')}, zero-shot, among {counted(len(labels), 'label')}:\n"
    )
    failed: list[str] = []
    for part in as_table(predictions(classifier, found, 3, failed)):
        write_text(part, None)
    readable = [picture for picture in found if picture not in failed]
    if readable:
        typer.echo(f"\n{speaker.model.name} says what they show:\n")
        for picture, (_, said) in zip(readable, speaker.caption_each(readable), strict=True):
            typer.echo(f"{picture}\n  {said[0].text}")
    finish(failed, len(found))
    typer.echo("\nTry your own: vlm classify PICTURE --labels 'cat,dog,red apple', or vlm caption PICTURE")
