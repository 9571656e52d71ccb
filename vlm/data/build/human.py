"""Emoji art: names, tags and groups of every concept, and its pictures by each artist."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.build.clean import emoji_key, slug
from vlm.data.build.items import Item
from vlm.data.build.packages import FLUENT, FLUENT_3D, NOTO, OPENMOJI, TWEMOJI, Package
from vlm.errors import DataError

STYLES: dict[str, tuple[Package, str]] = {
    "noto": (NOTO, "package/img/google/64/*.png"),
    "twemoji": (TWEMOJI, "package/img/twitter/64/*.png"),
    "fluent-3d": (FLUENT_3D, "package/assets/*.webp"),
    "fluent-modern": (FLUENT, "package/icons/modern/*.svg"),
    "fluent-flat": (FLUENT, "package/icons/flat/*.svg"),
    "fluent-high-contrast": (FLUENT, "package/icons/high-contrast/*.svg"),
    "openmoji-color": (OPENMOJI, "package/color/svg/*.svg"),
    "openmoji-black": (OPENMOJI, "package/black/svg/*.svg"),
}
# Names that the drawings' file names carry and Emojibase doesn't.
_SLUGS = {
    "hugging-face": "smiling-face-with-open-hands",
    "pouting-face": "enraged-face",
    "knocked-out-face": "face-with-crossed-out-eyes",
    "phoenix-bird": "phoenix",
    "blackbird": "black-bird",
    "person-zombie": "zombie",
    "person-genie": "genie",
    "person-blonde-hair": "person-blond-hair",
    "red-triangle": "red-triangle-pointed-up",
    "stuffedbread-flat": "stuffed-flatbread",
    "man-wrestling": "men-wrestling",
    "woman-wrestling": "women-wrestling",
    "person-wrestling": "people-wrestling",
    "man-with-bunny-ears": "men-with-bunny-ears",
    "woman-with-bunny-ears": "women-with-bunny-ears",
    "person-with-bunny-ears": "people-with-bunny-ears",
}
_KEYCAPS = {"keycap-hashtag": "23-20e3", "keycap-asterisk": "2a-20e3"}
_GENDER = re.compile(r"\b(man|men|woman|women|person|people|boy|girl|boys|girls|male|female)\b")
_PARTS = ("family", "kiss", "couple with heart", "person", "man", "woman", "people")


@dataclass(frozen=True)
class Concept:
    """An emoji: what it is called and where it belongs."""

    key: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    emoji: str

    @property
    def flag(self) -> bool:
        """Whether it is a flag: those look nearly alike by every artist."""
        return self.group == "flags"


def read_concepts(emojibase: Path) -> dict[str, Concept]:
    """The labelled concepts by key. Raises DataError when the package isn't laid out as expected."""
    folder = emojibase / "package" / "en"
    try:
        rows = json.loads((folder / "data.json").read_text("utf-8"))
        messages = json.loads((folder / "messages.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: emojibase's data can't be read ({error})") from error
    groups = {row["order"]: row["key"] for row in messages["groups"]}
    subgroups = {row["order"]: row["key"] for row in messages["subgroups"]}
    found = {}
    for row in rows:
        # Regional indicators, the letters from which flags are spelt, have no group.
        group = groups[row["group"]] if "group" in row else "symbols"
        subgroup = subgroups[row["subgroup"]] if "subgroup" in row else "regional-indicator"
        if subgroup == "skin-tone":
            continue
        key = emoji_key(row["hexcode"])
        found[key] = Concept(key, row["label"], tuple(row.get("tags", ())), group, subgroup, row["emoji"])
    return found


def family(name: str) -> str:
    """What the variants of one concept share: the name without gender, direction and family members."""
    head = name.split(":")[0]
    if head in _PARTS:
        name = head
    name = re.sub(r"facing right", "", name.lower())
    bare = " ".join(_GENDER.sub(" ", name).split()).strip(" ,:")
    return bare or "person"


def human_items(folders: Mapping[Package, Path], concepts: Mapping[str, Concept]) -> list[Item]:
    """Every picture of every concept, OpenMoji's (kind ``openmoji``) included; skin tones are left out."""
    by_slug = {slug(concept.name): key for key, concept in concepts.items()}
    items = []
    for style, (package, pattern) in STYLES.items():
        for path in sorted(folders[package].glob(pattern)):
            key = _fluent_key(path.stem, by_slug) if package is FLUENT else emoji_key(path.stem)
            concept = concepts.get(key)
            if concept is not None:
                items.append(_item(path, style, package, concept))
    if not items:
        raise DataError("no emoji picture was found: the packages aren't laid out as expected")
    return items


def _item(path: Path, style: str, package: Package, concept: Concept) -> Item:
    meta: dict[str, Any] = {
        "captions": [concept.name],
        "name": concept.name,
        "tags": list(concept.tags),
        "concept": concept.key,
        "group": concept.group,
        "subgroup": concept.subgroup,
        "style": style,
        "emoji": concept.emoji,
        "sibling": f"emoji:{slug(family(concept.name)) or concept.key}",
    }
    kind = "openmoji" if package is OPENMOJI else "human"
    return Item(f"{style}-{concept.key}", path, kind, meta["sibling"], package, meta)


def _fluent_key(stem: str, by_slug: Mapping[str, str]) -> str:
    """Concept of a drawing named in English; empty for other skin tones than the default one."""
    name = stem.removesuffix("-default")
    return _KEYCAPS.get(name) or by_slug.get(_SLUGS.get(name, slug(name)), "")
