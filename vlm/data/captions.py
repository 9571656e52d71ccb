"""Which text a picture gets in an epoch: a caption, its name with tags, or either inside a template."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlm.errors import ConfigError

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

    def __post_init__(self) -> None:
        for name in ("tags", "tags_alone", "template", "web"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"captions.{name} is a chance and must lie from 0 to 1, got {value!r}")
        if self.tags + self.tags_alone + self.web > 1 + 1e-9:
            raise ConfigError("captions.tags, captions.tags_alone and captions.web must add up to 1 at most")
        if self.most_tags < 1:
            raise ConfigError(f"captions.most_tags must be at least 1, got {self.most_tags!r}")


class Varied(NamedTuple):
    """A text, and what it was made of."""

    text: str
    caption: str
    """Without tags and template."""


def vary(meta: Mapping[str, Any], rng: random.Random, config: CaptionVariation) -> Varied:
    """A text for one showing of a sample: `captions` are drawn evenly, the rest by `config`. Never empty.

    meta: a sample's JSON. Where it has no tags or no ``web``, their chances fall to the captions; the
    uploaded text is never put inside a template.
    """
    caption = text = str(rng.choice(meta["captions"]))
    draw = rng.random()
    web, tags = meta.get("web"), _tags(meta, text)
    if draw < config.web and isinstance(web, str) and web.strip():
        return Varied(web.strip(), web.strip())
    draw -= config.web
    if tags and 0 <= draw < config.tags:
        text = ", ".join([text, *_some(tags, rng, config.most_tags)])
    elif tags and 0 <= draw - config.tags < config.tags_alone:
        text = ", ".join(_some(tags, rng, config.most_tags))
    if rng.random() < config.template:
        options = TEMPLATES + STYLED.get(str(meta.get("style", "")), ()) * 2
        text = rng.choice(options).format(text)
    return Varied(text, caption)


def first_caption(meta: Mapping[str, Any]) -> str:
    """The sample's main text, for evaluation."""
    return str(meta["captions"][0])


def _tags(meta: Mapping[str, Any], text: str) -> list[str]:
    """The sample's tags without those that only repeat `text`; shards of other makers hold any JSON there."""
    given = meta.get("tags")
    found = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else []
    clean = [tag.strip() for tag in found if isinstance(tag, str)]
    return [tag for tag in clean if tag and tag.casefold() != text.casefold()]


def _some(tags: list[str], rng: random.Random, most: int) -> list[str]:
    return rng.sample(tags, rng.randint(1, min(most, len(tags))))
