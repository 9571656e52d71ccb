"""Sentences that a label stands in; a classifier averages over them (CLIP, arXiv 2103.00020 §3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence

from vlm.data.tokenizers import Tokenizer
from vlm.errors import ConfigError, nearest

NAMED: dict[str, tuple[str, ...]] = {
    "none": ("{}",),
    "single": ("a photo of a {}.",),
    "drawing": ("a drawing of {}",),
    "drawings": (
        "{}",
        "a drawing of {}",
        "a picture of {}",
        "an image of {}",
        "a cartoon of {}",
        "clip art of {}",
        "an icon of {}",
        "{}, an illustration",
        "a 3D rendering of {}",
        "a flat drawing of {}",
        "a line drawing of {}",
        "a black and white icon of {}",
    ),
}
FROM_OPEN_CLIP = {"imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}
"""CLIP's 80 sentences for ImageNet, and the 7 of them that do nearly as well."""
NAMES = ("auto", *NAMED, *FROM_OPEN_CLIP)


def resolve_templates(
    templates: str | Sequence[str] | None = None, tokenizer: Tokenizer | None = None
) -> tuple[str, ...]:
    """Templates by name (see `NAMES`), one sentence, or a list of them; each holds ``{}`` or ``{label}`` once.

    None or ``auto`` asks what the model was trained on, which its tokenizer tells: with WordPiece, as this
    package's own models and when `tokenizer` is None, short captions, so the bare label; else CLIP's sentence
    for photos. Raises ConfigError for anything else.
    """
    if templates is None or templates == "auto":
        own = tokenizer is None or getattr(tokenizer, "kind", "") == "wordpiece"
        return NAMED["none"] if own else NAMED["single"]
    if isinstance(templates, str):
        if templates in FROM_OPEN_CLIP:
            return _from_open_clip(FROM_OPEN_CLIP[templates])
        if templates in NAMED:
            return NAMED[templates]
        if "{" in templates:
            return _checked([templates])
        raise ConfigError(
            f"templates {templates!r}: no set of that name{nearest(templates, NAMES)}; known: {', '.join(NAMES)}, "
            "or give a sentence with {} for the label (on the command line also a file, one sentence a line)"
        )
    return _checked(list(templates))


def fill(template: str, label: str) -> str:
    """The sentence with a label in it."""
    before, _, after = template.partition("{label}" if "{label}" in template else "{}")
    return before + label + after


def _checked(templates: list[str]) -> tuple[str, ...]:
    if not templates:
        raise ConfigError("templates: the list is empty; leave it out for the model's own choice")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") + template.count("{label}") != 1:
            raise ConfigError(f"template {template!r}: expected a sentence with {{}} once, as in 'a photo of a {{}}.'")
    return tuple(templates)


def _from_open_clip(name: str) -> tuple[str, ...]:
    import open_clip

    return tuple(str(template("{}")) for template in getattr(open_clip, name))
