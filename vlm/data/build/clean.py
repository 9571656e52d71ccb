"""Names from files, titles and keywords: what uploaders wrote, made into captions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# Titles of whole collections: they say nothing about the picture.
_COLLECTION = re.compile(
    r"collection|theme|iconset|icon set|icons$|aiga|various clip|gramastar|r16 |clipart|clip art by|^card$"
    r"|map symbols|^untitled|^people$|road signs|^advertising$|rpg map|^icon$|^drawing",
    re.IGNORECASE,
)
_PREFIXES = {"aiga", "bb", "stock", "gnome", "gtk", "mime", "kde", "svg", "b", "pattern", "fs"}
_NOISE = re.compile(
    r"hash|icons?|theme|actions?|unsorted|mapsym|shapes?|menu|computer|lemon_theme_icon|appicon|applications?"
    r"|signs?_and_symbols|symbols?|sign|image|clip_?art|openclipart|svg|externalsource|miscellany|public_domain"
    r"|contour|united_nations_member|recreation|mimetypes|filesystems?|simple|media"
)
MOST_TITLES = 12
"""A title on more pictures than this is taken for a collection's."""


def slug(text: str) -> str:
    """Lower-case letters and digits joined by dashes, without accents."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"[a-z0-9]+", plain.lower().replace("'", "")))


def emoji_key(text: str) -> str:
    """Code points of an emoji without leading zeros and without the variation selector FE0F."""
    parts = (part.lstrip("0") for part in text.lower().split("-"))
    return "-".join(part for part in parts if part != "fe0f")


def is_collection(title: str, count: int) -> bool:
    """Whether a title, found on `count` pictures, names a collection and not what is drawn."""
    return not title.strip() or count > MOST_TITLES or bool(_COLLECTION.search(title))


def from_title(title: str) -> str:
    """A title as a caption: words apart, no numbering, no remarks in brackets."""
    text = re.sub(r"\([^)]*\)|\[[^]]*\]", " ", title)
    return _words(re.sub(r"[#_]+|\bhash\b|\d+$", " ", text))


def from_stem(stem: str, author: str) -> str:
    """A file's name as a caption, without the author's name at its end, numbers and theme prefixes.

    ``acquila_architetto_franc_01`` by Architetto Francesco Rollandin gives ``acquila``.
    """
    tokens = [token for token in re.split(r"[^a-zA-Z0-9]+", _split_humps(stem)) if token]
    names = [name for name in re.split(r"\W+", author.lower()) if len(name) > 1]
    while len(tokens) > 1 and _is_tail(tokens[-1].lower(), names):
        tokens.pop()
    while len(tokens) > 1 and tokens[0].lower() in _PREFIXES:
        tokens.pop(0)
    kept = [token for token in tokens if not re.search(r"\d", token)]
    kept = kept or [re.sub(r"\d+", "", token) for token in tokens]
    return _words(" ".join(kept))


def keywords(raw: Iterable[str]) -> list[str]:
    """Keywords that say something, in their order, each once."""
    found = []
    for word in raw:
        word = word.strip().lower()
        if (
            _NOISE.fullmatch(word)
            or "hash(" in word
            or len(word) < 3
            or len(word) > 40
            or "@" in word
            or "theme" in word
        ):
            continue
        found.append(_words(word.replace("_", " ")))
    return [word for word in dict.fromkeys(found) if word]


def description(text: str, caption: str) -> str:
    """The uploader's description when it adds to the caption; its first sentence, at most 120 characters."""
    text = " ".join(text.split())
    if len(text) < 8 or re.search(r"@|https?:|www\.|HASH\(|convert|licen[sc]e|copyright|inkscape", text, re.IGNORECASE):
        return ""
    first = re.split(r"(?<=[.!?])\s", text)[0].rstrip(".")[:120].strip()
    return "" if slug(first) == slug(caption) or len(re.findall(r"[A-Za-z]{2,}", first)) < 2 else first


def web_caption(title: str, count: int, stem: str, author: str, folder: str) -> str:
    """The cleaned caption of a clip-art picture; empty when nothing usable is left.

    title: on `count` pictures. folder: where the file lies; it tells flags and playing cards.
    """
    text = from_stem(stem, author) if is_collection(title, count) else from_title(title)
    if len(re.findall(r"[^\W\d_]", text)) < 3:
        text = from_stem(stem, author)
    if len(re.findall(r"[^\W\d_]", text)) < 3:
        return ""
    for part, word in (("flags", "flag"), ("cards", "playing card"), ("jigsaw", "jigsaw")):
        if part in folder.split("/") and word not in text.lower():
            text = f"{text} {word}"
    return text


def _is_tail(token: str, names: list[str]) -> bool:
    if re.fullmatch(r"\d+[a-z]?|r|v\d*|svg|[a-z]", token):
        return True
    return len(token) > 1 and any(name.startswith(token) for name in names)


def _split_humps(text: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)


def _words(text: str) -> str:
    text = " ".join(_split_humps(text).replace("_", " ").split()).strip(" -.,:;")
    return text.lower() if text.isupper() or text.istitle() else text
