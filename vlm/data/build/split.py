"""Which picture stands in which split: fixed by hashes, clusters whole, nothing alike across splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlm.data.build.items import Item
from vlm.data.build.perceptual import near_identical, signatures
from vlm.data.samples import stable_id

TRAIN = ("human-train", "web-train")
EVALUATION = ("unseen-concept", "web-val", "web-test", "unseen-artist")


def share(text: str) -> float:
    """A number in [0, 1) that is the same for a text on every machine."""
    return (stable_id(text) % 1_000_003) / 1_000_003


def human_split(cluster: str) -> str:
    """About 10 % of the concepts' families are held out, in every style."""
    return "unseen-concept" if share(f"concept:{cluster}") < 0.1 else "human-train"


def web_split(cluster: str) -> str:
    """5 % to validation, 5 % to test."""
    place = share(f"web:{cluster}")
    return "web-val" if place < 0.05 else "web-test" if place < 0.1 else "web-train"


def assign(
    items: Sequence[Item], images: Sequence[Image.Image], stored: Sequence[Image.Image]
) -> tuple[list[str], Counter[str]]:
    """The split of each item, empty for those left out, and how many were left out of each split.

    Web pictures that look alike join one cluster with their siblings. Then an evaluation picture that looks
    like a training picture, or like one of an earlier evaluation split, is left out: what is measured was
    never seen.

    images, stored: each item's picture as drawn and as a reader of the shards gets it. Alike in either is
    alike, since compression moves a pair over the limit now and then.
    """
    looks = signatures(images), signatures(stored)
    drawn = looks[0]
    web = [number for number, item in enumerate(items) if item.kind == "web"]
    roots = _web_clusters(items, web, near_identical(_take(drawn, web), _take(drawn, web)))
    splits = []
    for number, item in enumerate(items):
        if item.kind == "web":
            splits.append(web_split(roots[number]))
        else:
            splits.append("unseen-artist" if item.kind == "openmoji" else human_split(item.cluster))
    left_out: Counter[str] = Counter()
    seen = [number for number, split in enumerate(splits) if split in TRAIN]
    for split in EVALUATION:
        mine = [number for number, found in enumerate(splits) if found == split]
        alike = {i for look in looks for i, _ in near_identical(_take(look, mine), _take(look, seen))}
        for place in alike:
            splits[mine[place]] = ""
            left_out[split] += 1
        seen += [number for number in mine if splits[number]]
    return splits, left_out


def _take(look: tuple[np.ndarray, np.ndarray], rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    hashes, grids = look
    return hashes[rows], grids[rows]


def _web_clusters(items: Sequence[Item], web: list[int], pairs: list[tuple[int, int]]) -> dict[int, str]:
    """A name for each web item's cluster: the least sibling name among all that hang together."""
    parent = {items[number].cluster: items[number].cluster for number in web}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for i, j in pairs:
        first, second = sorted((root(items[web[i]].cluster), root(items[web[j]].cluster)))
        parent[second] = first
    return {number: root(items[number].cluster) for number in web}
