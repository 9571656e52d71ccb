"""What is in published checkpoints at full size: names, types and shapes."""

from __future__ import annotations

import json
import re
from pathlib import Path


def official(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in the file ``NAME.json``; {a..b}, {a..b..step} and {,_m} are spelt out."""
    listed = json.loads((Path(__file__).parent / f"{name}.json").read_text("utf-8"))["tensors"]
    return {spelt: (kind, tuple(shape)) for short, (kind, *shape) in listed.items() for spelt in _spelt(short)}


def _spelt(short: str) -> list[str]:
    match = re.search(r"\{(?:(\d+)\.\.(\d+)(?:\.\.(\d+))?|,(\w+))\}", short)
    if match is None:
        return [short]
    choices = ["", match[4]] if match[4] else range(int(match[1]), int(match[2]) + 1, int(match[3] or 1))
    before, after = short[: match.start()], short[match.end() :]
    return [whole for choice in choices for whole in _spelt(f"{before}{choice}{after}")]
