"""Models that come with the package, and folders that keep only what differs from one of them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from torch import Tensor

from vlm.errors import WeightsError, nearest
from vlm.weights.files import BASE, CARD, CONFIG, WEIGHTS, Base, read_json, read_tensors, with_shared


def shipped() -> dict[str, str]:
    """Names of the models that come with the package, and the first sentence of their cards."""
    found = {}
    for folder in sorted(_assets().iterdir()):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            text = (folder / CARD).read_text("utf-8") if (folder / CARD).is_file() else ""
            lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("#", "---"))]
            found[folder.name] = lines[0] if lines else ""
    return found


def shipped_folder(name: str) -> Path | None:
    """The folder of a shipped model, None for a name that isn't one."""
    plain = "/" not in name and "\\" not in name
    return _assets() / name if plain and (_assets() / name / CONFIG).is_file() else None


def base_of(name: str, *, where: str) -> Base:
    """A shipped model as a base. Raises WeightsError, which names `where`, when there is none of that name."""
    folder = shipped_folder(name)
    if folder is None:
        names = list(shipped())
        raise WeightsError(f"{where}: no shipped model {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    return Base(name, model_tensors(folder))


def model_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder that `save_model` wrote, those it shares with its base included.

    Raises WeightsError when a file can't be read or the base isn't shipped here.
    """
    tensors, base = read_tensors(folder / WEIGHTS), read_json(folder / CONFIG).get(BASE)
    if base is None:
        return tensors
    return with_shared(tensors, base_of(str(base), where=str(folder / CONFIG)), where=str(folder / WEIGHTS))


def _assets() -> Path:
    return Path(str(resources.files("vlm"))) / "assets"
