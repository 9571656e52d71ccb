"""A small captioner for the command line, what it says, and where captions stand."""

from __future__ import annotations

import json
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.generated import captioner, reference
from vlm.generate import GenerationConfig
from vlm.tasks.caption import Captioner
from vlm.weights.loaded import VisionLanguageModel

SHORT = ("--max-new-tokens", 6)


@cache
def small() -> VisionLanguageModel:
    return captioner(reference(vocabulary=30524, start=30522, end=102, end_bias=4.0))


def said(*paths: Path, **settings: Any) -> dict[str, list[str]]:
    config = GenerationConfig(**({"max_new_tokens": 6} | settings))
    found = Captioner(small(), config).caption_each(paths)
    return {str(path): [one.text for one in texts] for path, texts in found}


def lines_of(text: str) -> dict[str, list[str]]:
    rows = [json.loads(line) for line in text.splitlines()]
    return {row["path"]: [one["caption"] for one in row["captions"]] for row in rows}


def shard(path: Path, pictures: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for picture in sorted(pictures.iterdir()):
            tar.add(picture, picture.name)
    return path
