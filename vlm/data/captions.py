"""Which text a picture gets in an epoch: a caption, its name with tags, or either inside a template."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEMPLATES = (
    "a drawing of {}",
    "a picture of {}",
    "an image of {}",
    "a cartoon of {}",
    "clip art of {}",
    "an icon of {}",
    "{}, an illustration",
    "this is {}",
)
STYLED = {
    "clip-art": ("clip art of {}", "a clip art drawing of {}"),
    "openmoji-black": ("a line drawing of {}",),
    "fluent-high-contrast": ("a black and white icon of {}", "a silhouette of {}"),
    "fluent-flat": ("a flat drawing of {}", "a flat emoji of {}"),
    "fluent-3d": ("a 3D rendering of {}", "a 3D emoji of {}"),
}


@dataclass(frozen=True)
class CaptionVariation:
    """Chances of other texts than a sample's captions; all zero keeps to the captions."""

    tags: float = 0.0
    """Chance of the caption followed by some of the sample's tags: ``dog face, animal, pet``."""
    tags_alone: float = 0.0
    """Chance of some tags without the caption."""
    most_tags: int = 4
    """Tags at most."""
    template: float = 0.0
    """Chance that the text stands inside a template, one of the picture's style where it has some."""
    web: float = 0.0
    """Chance of the text as it was uploaded, where the sample has one."""


def vary(meta: Mapping[str, Any], rng: random.Random, config: CaptionVariation) -> str:
    """A text for one showing of a sample: `captions` are drawn evenly, the rest by `config`. Never empty."""
    text = rng.choice(meta["captions"])
    draw = rng.random()
    tags = [tag for tag in meta.get("tags") or () if isinstance(tag, str) and tag.strip()]
    if draw < config.web and str(meta.get("web") or "").strip():
        return str(meta["web"])
    draw -= config.web
    if tags and 0 <= draw < config.tags:
        text = ", ".join([text, *_some(tags, rng, config.most_tags)])
    elif tags and 0 <= draw - config.tags < config.tags_alone:
        text = ", ".join(_some(tags, rng, config.most_tags))
    if rng.random() < config.template:
        options = TEMPLATES + STYLED.get(str(meta.get("style", "")), ()) * 2
        text = rng.choice(options).format(text)
    return text


def first_caption(meta: Mapping[str, Any]) -> str:
    """The sample's main text, for evaluation."""
    return str(meta["captions"][0])


def _some(tags: list[str], rng: random.Random, most: int) -> list[str]:
    return rng.sample(tags, rng.randint(1, min(most, len(tags))))
