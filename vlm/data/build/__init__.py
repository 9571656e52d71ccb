"""The repository's own data set, made from public packages (``vlm data build``)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.build.human import human_items, read_concepts
from vlm.data.build.items import Item
from vlm.data.build.packages import CLIPART, EMOJIBASE, PACKAGES, fetch
from vlm.data.build.render import encode, render
from vlm.data.build.split import assign
from vlm.data.build.web import read_uploads, web_items
from vlm.data.build.write import write_set
from vlm.data.images import decode_image
from vlm.errors import DataError

logger = logging.getLogger("vlm.data")


@dataclass(frozen=True)
class Drawn:
    """A picture ready to be written."""

    item: Item
    content: bytes
    """The encoded picture."""
    split: str


def build(out: Path, *, work: Path, workers: int = 2) -> dict[str, Any]:
    """Fetch the packages, draw every picture, split, and write shards, manifest and licences to `out`.

    work: where packages are kept, so that a second build downloads nothing. Returns the manifest.
    Raises DataError when a package can't be fetched or read.
    """
    folders = {package: fetch(package, work) for package in PACKAGES}
    concepts = read_concepts(folders[EMOJIBASE])
    web, left_out = web_items(read_uploads(folders[CLIPART]))
    items = with_own_keys(human_items(folders, concepts) + web)
    logger.info("drawing %d pictures", len(items))
    drawn, images = [], []
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(_drawn, items, chunksize=64)
        for item, image in zip(items, results, strict=True):
            if image is None:
                left_out[f"{item.kind}: blank, or can't be drawn"] += 1
            else:
                drawn.append(item)
                images.append(image)
    drawn, images, same = merge_identical(drawn, images)
    left_out["web: the very same picture again (its texts are kept)"] = same
    with ProcessPoolExecutor(workers) as pool:
        contents = list(pool.map(encode, images, chunksize=64))
    splits, alike = assign(drawn, images, [decode_image(content) for content in contents])
    for split, count in alike.items():
        left_out[f"{split}: looks like a picture of another split"] = count
    ready = [Drawn(*row) for row in zip(drawn, contents, splits, strict=True) if row[2]]
    return write_set(out, ready, concepts, left_out, folders)


def with_own_keys(items: Iterable[Item]) -> list[Item]:
    """Items with keys that differ: a second emoji of one style is left out, a second drawing gets a number."""
    seen: dict[str, int] = {}
    kept = []
    for item in items:
        seen[item.key] = seen.get(item.key, 0) + 1
        if seen[item.key] > 1:
            if item.kind != "web":
                continue
            item.key = f"{item.key}--{seen[item.key]}"
        kept.append(item)
    return kept


def merge_identical(items: Iterable[Item], images: Iterable[Image.Image]) -> tuple[list[Item], list[Image.Image], int]:
    """One item for each web picture, with the captions, tags and siblings of all its copies.

    Returns the items and pictures that stay, and how many copies were merged away.
    """
    first: dict[bytes, Item] = {}
    kept_items, kept_images, merged = [], [], 0
    for item, image in zip(items, images, strict=True):
        known = first.setdefault(image.tobytes(), item) if item.kind == "web" else item
        if known is item:
            kept_items.append(item)
            kept_images.append(image)
            continue
        merged += 1
        for name in ("captions", "tags"):
            known.meta[name] = list(dict.fromkeys([*known.meta[name], *item.meta[name]]))
    return kept_items, kept_images, merged


def _drawn(item: Item) -> Image.Image | None:
    try:
        return render(item.path, crop=item.kind == "web")
    except DataError as error:
        logger.info("%s", error)
        return None
