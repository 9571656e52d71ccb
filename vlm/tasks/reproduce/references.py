"""Rows of reference: models as they are, measured like a grid's runs and not trained for it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm.errors import DataError, WeightsError
from vlm.files import write_text
from vlm.tasks.reproduce.grid import PLACE, REFERENCE, RESULT, folder_name, read_results
from vlm.train.environment import surroundings
from vlm.weights.files import WEIGHTS
from vlm.weights.shipped import shipped_folder

logger = logging.getLogger("vlm.reproduce")

COLUMN = "none, as shipped"


def reference_results(
    models: Sequence[str],
    *,
    out: Path,
    measure: Callable[[str], dict[str, float]],
    measured: Sequence[str] = (),
    known: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Measure each model once; what `out` or `known` hold of the same weights isn't measured again.

    models: shipped names or model folders. measured: what figures depend on besides the weights. Returns results for
    a grid's table. Raises WeightsError for a model that isn't there.
    """
    found = []
    for model in models:
        settings = [f"sha256={_weights_of(model)}", *measured]
        path = out / folder_name(model) / RESULT
        earlier = [one for one in known if one.get(REFERENCE)] + (read_results(path) if path.is_file() else [])
        result = next((one for one in earlier if (one["row"], one["settings"]) == (model, settings)), None)
        if result is None:
            logger.info("measuring %s", model)
            result = {"row": model, "column": COLUMN, "seed": 0, "settings": settings, REFERENCE: True}
            result |= {"figures": measure(model), PLACE: surroundings()}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(result, indent=1) + "\n", error=DataError)
        found.append(result)
    return found


def _weights_of(model: str) -> str:
    """SHA-256 of a model's weights file."""
    path = (shipped_folder(model) or Path(model)) / WEIGHTS
    if not path.is_file():
        raise WeightsError(f"{model}: no model to compare with there; expected a shipped name or a model folder")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
