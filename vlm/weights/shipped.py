"""Models that come with the package, and folders that keep only what differs from one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from torch import Tensor

from vlm.errors import WeightsError, nearest
from vlm.weights.base import BASE, Base, with_shared
from vlm.weights.files import CARD, CONFIG, WEIGHTS, read_json, read_tensors


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


def base_folder(name: str, *, where: str) -> Path:
    """The folder of a shipped model that can be a base for others, since it has none itself.

    Raises WeightsError, which names `where`, when there is none of that name.
    """
    folder = shipped_folder(name)
    if folder is None:
        names = list(shipped())
        raise WeightsError(f"{where}: no shipped model {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    if BASE in read_json(folder / CONFIG):
        raise WeightsError(f"{where}: {name} is kept as a part of another model itself; choose one that isn't")
    return folder


def base_of(name: str, *, where: str) -> Base:
    """A shipped model as a base for others. Raises WeightsError as `base_folder` does."""
    folder = base_folder(name, where=where)
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Base(name, read_tensors(folder / WEIGHTS), digest)


def model_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder that `save_model` wrote, those it shares with its base included.

    Raises WeightsError when a file can't be read, or the base isn't shipped here as it was then.
    """
    tensors, given = read_tensors(folder / WEIGHTS), read_json(folder / CONFIG).get(BASE)
    if given is None:
        return tensors
    if not isinstance(given, Mapping) or not {"name", "sha256"} <= given.keys():
        raise WeightsError(f"{folder / CONFIG}: {BASE} must have a name and a sha256, got {given!r}")
    base = base_of(str(given["name"]), where=str(folder / CONFIG))
    if base.sha256 != given["sha256"]:
        raise WeightsError(
            f"{folder}: was kept as a part of {base.name} with the SHA-256 {given['sha256'][:16]}..., but the one "
            f"shipped here has {base.sha256[:16]}...; use the version of vlm that it was written with"
        )
    own = base.only(given["parts"]) if "parts" in given else base
    return with_shared(tensors, own, where=str(folder / WEIGHTS), whole=base)


def _assets() -> Path:
    return Path(str(resources.files("vlm"))) / "assets"
