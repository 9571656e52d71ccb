"""`load`: the only door to weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlm.data.tokenizers import load_tokenizer
from vlm.data.transforms import ImageTransform
from vlm.errors import WeightsError, nearest, reason, with_article
from vlm.weights.families import family
from vlm.weights.files import CONFIG, WEIGHTS, adopt, build, read_json, read_tensors
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.shipped import model_tensors, shipped, shipped_folder

ACCEPTED = (
    "a shipped name, a model or run folder of vlm, a Hugging Face CLIP, ViLT, BLIP or BLIP-2 repo id or folder, "
    "open_clip:ARCH/TAG, open_clip:ARCH/FILE, or a checkpoint file of CLIP or of the official ALBEF, BLIP or BLIP-2"
)
CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin")


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    image: str | Path | None = None,
    llm: str = "",
) -> VisionLanguageModel:
    """Load a model, ready for use in eval mode.

    name_or_path: a shipped name (see `shipped`), a model or run folder of vlm, a Hugging Face CLIP, ViLT, BLIP or
    BLIP-2 repo id or folder, ``open_clip:ARCH/TAG`` with one of open_clip's pretrained tags, ``open_clip:ARCH/FILE``,
    or a file with OpenAI's or open_clip's CLIP weights, or the official ALBEF's, BLIP's or BLIP-2's. device: ``auto``
    for a GPU when there is one. dtype: of the weights; fp32 if None. image: a file with the image encoder of an
    official BLIP-2, which its own file leaves out; eva_vit_g.pth beside that one if None. llm: the language model of an
    official stage-2 BLIP-2, whose file names none; or where that of a stage-2 model is, if not where its name says: the
    same one, by a hash of its weights. Raises WeightsError that says what was expected, and lists every tensor that
    doesn't fit.
    """
    model = _found(str(name_or_path), image, llm)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device, dtype or torch.float32)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(f"device {device!s}: can't be used ({str(error)[:200]}); use device='cpu'") from error
    model.network.eval().requires_grad_(False)
    return model


def load_folder(folder: Path, *, llm: str = "") -> VisionLanguageModel:
    """A model folder that `save_model` wrote; llm: see `load`.

    Raises WeightsError when it isn't one or doesn't fit.
    """
    settings = read_json(folder / CONFIG)
    stage = str(settings.get("family"))
    kind = family(stage, where=str(folder))
    from pydantic import TypeAdapter, ValidationError

    try:
        config: Any = TypeAdapter(kind.config).validate_python(settings["config"])
        transform = ImageTransform.from_dict(settings["transform"])
    except (KeyError, ValidationError, TypeError) as error:
        raise WeightsError(f"{folder / CONFIG}: not a model's configuration ({reason(error)})") from error
    tensors, where = model_tensors(folder), str(folder / WEIGHTS)
    if kind.complete is None:
        if llm:
            raise WeightsError(
                f"{folder}: {with_article(stage)} model speaks without a language model; llm is for stage 2 of BLIP-2"
            )
        network = build(lambda: kind.network(config), tensors, where=where)
    else:
        with torch.device("meta"):
            network = kind.network(config)
        kind.complete(network, llm=llm)
        if hasattr(network, "adapt"):
            network.adapt()  # type: ignore[operator]
        adopt(network, tensors, where=where)
    name = str(settings.get("name") or folder.name)
    return VisionLanguageModel(network, load_tokenizer(folder), transform, name=name, family=stage)


def run_model(run: Path) -> Path | None:
    """The model folder of a run: the final one, else the best checkpoint's, else the newest's."""
    if (run / "model" / CONFIG).is_file():
        return run / "model"
    steps = sorted(path for path in (run / "checkpoints").glob("step-*") if (path / "trainer.json").is_file())
    if not steps:
        return None
    best = read_json(steps[-1] / "trainer.json").get("best_step", -1)
    chosen = run / "checkpoints" / f"step-{best:08d}"
    return (chosen if chosen in steps else steps[-1]) / "model"


def _found(name: str, image: str | Path | None, llm: str) -> VisionLanguageModel:
    if image is not None and Path(name).suffix not in CHECKPOINTS:
        raise WeightsError(f"{name}: no checkpoint file, so image={str(image)!r} says nothing; leave it out")
    if name.startswith("open_clip:"):
        from vlm.weights.from_open_clip import load_open_clip

        return load_open_clip(name.removeprefix("open_clip:"))
    own = shipped_folder(name)
    if own is not None:
        return load_folder(own, llm=llm)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path, llm)
    if path.is_file() and path.suffix not in CHECKPOINTS:
        raise WeightsError(f"{name}: a file, but no checkpoint; expected one that ends in {', '.join(CHECKPOINTS)}")
    if path.suffix in CHECKPOINTS:
        return _from_checkpoint(path, image, llm)
    from vlm.weights.from_hf import is_repo_id, load_hub

    if is_repo_id(name):
        return load_hub(name)
    names = list(shipped())
    listed = ", ".join(names) or "none in this checkout"
    raise WeightsError(f"{name}: no such model{nearest(name, names)}. Shipped: {listed}. Expected {ACCEPTED}.")


def _from_folder(folder: Path, llm: str) -> VisionLanguageModel:
    run = run_model(folder)
    if run is not None:
        return load_folder(run, llm=llm)
    if not (folder / CONFIG).is_file():
        raise WeightsError(f"{folder}: no {CONFIG} there, so this is no model; expected {ACCEPTED}")
    settings: dict[str, Any] = read_json(folder / CONFIG)
    if "family" in settings:
        return load_folder(folder, llm=llm)
    from vlm.weights.from_hf import load_hf_folder

    if llm:
        raise WeightsError(f"{folder}: a folder of transformers holds its language model; leave llm out")
    return load_hf_folder(folder)


def _from_checkpoint(path: Path, image: str | Path | None, llm: str) -> VisionLanguageModel:
    from vlm.weights.from_open_clip import load_checkpoint
    from vlm.weights.official import layout_of, load_official

    tensors = read_tensors(path)
    if layout_of(tensors) is not None:
        return load_official(path, tensors=tensors, image=image, llm=llm)
    return load_checkpoint(path, tensors=tensors)
