"""Open Clip Art: pictures with the texts that their uploaders gave them, as they are and cleaned."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

from vlm.data.build.clean import description, keywords, slug, web_caption
from vlm.data.build.items import Item
from vlm.data.build.packages import CLIPART

ROOT = "usr/share/openclipart/svg"


@dataclass(frozen=True)
class Upload:
    """What an SVG says about itself."""

    path: Path
    folder: str
    title: str
    description: str
    keywords: tuple[str, ...]
    author: str
    gpl: bool


def read_uploads(package: Path) -> list[Upload]:
    """The texts of every SVG in the unpacked package, in the order of their paths."""
    root = package / ROOT
    return [_read(path, root) for path in sorted(root.rglob("*.svg"))]


def web_items(uploads: list[Upload]) -> tuple[list[Item], Counter[str]]:
    """Items with both texts, and how many uploads were left out, by reason."""
    titles = Counter(upload.title for upload in uploads)
    items, left_out = [], Counter[str]()
    for upload in uploads:
        if upload.gpl:
            left_out["marked GPL"] += 1
            continue
        if upload.title == "gramastar":
            left_out["one of 1,375 star polygons of one series"] += 1
            continue
        caption = web_caption(upload.title, titles[upload.title], upload.path.stem, upload.author, upload.folder)
        if caption:
            items.append(_item(upload, caption))
        else:
            left_out["no usable text"] += 1
    return items, left_out


def sibling(upload: Upload) -> str:
    """Drawings of one series: the file's name without numbers at its end, whatever folder it lies in."""
    stem = re.sub(r"(_r|_\d*[a-z]?|[\d_]+)$", "", upload.path.stem.lower())
    stem = re.sub(r"[\d_]+$", "", stem)
    return f"clip:{slug(stem) or slug(upload.path.stem)}"


def _item(upload: Upload, caption: str) -> Item:
    known = {slug(caption), slug(upload.author)}
    tags = [word for word in keywords(upload.keywords) if slug(word) not in known]
    captions = [caption]
    extra = description(upload.description, caption)
    if extra:
        captions.append(extra)
    web = upload.title or upload.description or ", ".join(upload.keywords) or upload.path.stem
    meta: dict[str, Any] = {
        "captions": captions,
        "web": web,
        "name": caption,
        "tags": tags,
        "concept": f"web:{slug(caption)}",
        "style": "clip-art",
        "group": upload.folder.split("/")[0],
        "subgroup": upload.folder,
        "sibling": sibling(upload),
        "attribution": f"{upload.author}, {CLIPART.attribution}" if upload.author else CLIPART.attribution,
    }
    if upload.description:
        meta["description"] = upload.description
    relative = f"{upload.folder}/{upload.path.stem}".replace(".", "-")
    return Item(f"clip-{slug(relative)}", upload.path, "web", meta["sibling"], CLIPART, meta)


def _read(path: Path, root: Path) -> Upload:
    text = path.read_text("utf-8", "replace")
    start = text.find("<metadata")
    about = text[start : start + 20000].split("</metadata>")[0] if start >= 0 else ""
    creator = re.search(r"<dc:creator>.*?<dc:title>([^<]*)</dc:title>", about, re.DOTALL)
    words = tuple(word for word in _all(r"<rdf:li>([^<]*)</rdf:li>", about) if word)
    rights = " ".join(_all(r"<cc:license[^>]*rdf:resource=\"([^\"]*)\"", about)) + about[:20000]
    return Upload(
        path,
        path.parent.relative_to(root).as_posix(),
        next(iter(_all(r"<dc:title>([^<]*)</dc:title>", about)), ""),
        next(iter(_all(r"<dc:description[^>]*>([^<]*)</dc:description>", about)), ""),
        words,
        " ".join(unescape(creator.group(1)).split()) if creator else "",
        bool(re.search(r"\bGPL|GNU General Public", rights)),
    )


def _all(pattern: str, text: str) -> list[str]:
    return [" ".join(unescape(found).split()) for found in re.findall(pattern, text, re.DOTALL)]
