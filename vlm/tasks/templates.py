"""Sentences that a label stands in; a classifier averages over them (CLIP, arXiv 2103.00020 §3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence

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


def resolve_templates(templates: str | Sequence[str] | None) -> tuple[str, ...]:
    """Templates by name (``none``, ``single``, ``drawing``, ``drawings``, ``imagenet``), or a list of them.

    A template holds ``{}`` or ``{label}`` once. None is the bare label. Raises ConfigError otherwise.
    """
    if templates is None:
        return NAMED["none"]
    if isinstance(templates, str):
        if templates == "imagenet":
            return _imagenet()
        if templates in NAMED:
            return NAMED[templates]
        if "{" in templates:
            return _checked([templates])
        names = [*NAMED, "imagenet"]
        raise ConfigError(
            f"templates {templates!r}: no set of that name{nearest(templates, names)}; known: {', '.join(names)}, "
            "or give a sentence with {} for the label"
        )
    return _checked(list(templates))


def fill(template: str, label: str) -> str:
    """The sentence with a label in it."""
    return template.replace("{label}", label).replace("{}", label)


def _checked(templates: list[str]) -> tuple[str, ...]:
    if not templates:
        raise ConfigError("templates: the list is empty; leave it out for the bare label")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") + template.count("{label}") != 1:
            raise ConfigError(f"template {template!r}: expected a sentence with {{}} once, as in 'a photo of a {{}}.'")
    return tuple(templates)


def _imagenet() -> tuple[str, ...]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(str(template("{}")) for template in OPENAI_IMAGENET_TEMPLATES)
