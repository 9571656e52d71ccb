"""What is committed under data/: whole, licensed, split without overlap."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.data.build.packages import OPENMOJI, PACKAGES
from vlm.data.build.perceptual import near_identical, signatures

DATA = Path(__file__).resolve().parents[2] / "data"
TRAIN = {"human-train", "web-train"}
EVALUATION = ["unseen-concept", "web-val", "web-test", "unseen-artist"]


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads((DATA / "manifest.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def samples(manifest) -> list[tuple[str, dict, bytes]]:
    """(shard file, JSON, picture) of everything, read with nothing but the standard library."""
    found = []
    for shard in manifest["shards"]:
        parts: dict[str, dict[str, bytes]] = defaultdict(dict)
        with tarfile.open(DATA / shard["file"]) as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                assert suffix not in parts[key], f"{key}.{suffix} stands twice in {shard['file']}"
                parts[key][suffix] = tar.extractfile(member).read()
        assert len(parts) == shard["samples"]
        found += [(shard["file"], json.loads(part["json"]), part["webp"]) for part in parts.values()]
    return found


@pytest.fixture(scope="module")
def images(samples) -> list[Image.Image]:
    return [Image.open(io.BytesIO(content)).convert("RGB") for _, _, content in samples]


def test_shards_are_those_of_the_manifest(manifest):
    total = 0
    for shard in manifest["shards"]:
        content = (DATA / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"], shard["file"]
        assert len(content) == shard["bytes"]
        total += len(content)
    assert total == manifest["bytes"] < 34e6
    on_disk = {path.relative_to(DATA).as_posix() for path in DATA.rglob("*.tar.gz")}
    assert on_disk == {shard["file"] for shard in manifest["shards"]}


def test_counts(manifest, samples):
    counted = defaultdict(int)
    for _, meta, _ in samples:
        counted[meta["split"]] += 1
    assert dict(counted) == manifest["splits"]
    # About what the packages were counted to hold: three artists in six styles, OpenMoji in two.
    styles = defaultdict(set)
    for _, meta, _ in samples:
        styles[meta["style"]].add(meta["concept"])
    assert len(styles["noto"]) > 1890 and len(styles["twemoji"]) > 1890 and len(styles["fluent-3d"]) > 1830
    assert min(len(styles[f"fluent-{look}"]) for look in ("modern", "flat", "high-contrast")) > 1550
    assert len(styles["openmoji-color"]) == 1944 and len(styles["openmoji-black"]) >= 1943


def test_labels_list_every_concept(samples, manifest):
    with (DATA / "labels.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == manifest["concepts"] == 1944 == len({row["concept"] for row in rows})
    names = {row["concept"]: row["name"] for row in rows}
    for _, meta, _ in samples:
        if "emoji" in meta:
            assert names[meta["concept"]] == meta["name"] == meta["captions"][0]
    assert {row["flag"] for row in rows} == {"0", "1"}


def test_every_sample_names_its_origin(samples):
    licences = {package.label: package.licence for package in PACKAGES}
    for file, meta, _ in samples:
        assert meta["captions"] and all(text.strip() for text in meta["captions"])
        assert meta["licence"] == licences[meta["source"]] and meta["attribution"].strip()
        assert file.startswith("openmoji/") == (meta["source"] == OPENMOJI.label) == (meta["split"] == "unseen-artist")
        if meta["style"] == "clip-art":
            assert meta["web"].strip() and meta["licence"] == "LicenseRef-Public-Domain"
    assert "Attribution-ShareAlike 4.0" in (DATA / "openmoji" / "LICENSE").read_text("utf-8")


def test_pictures_are_96_pixels(samples, images):
    assert {image.size for image in images} == {(96, 96)}
    assert all(np.asarray(image).min() <= 245 for image in images)


def test_held_out_concepts_are_in_no_training_shard(samples):
    by_split = defaultdict(set)
    for _, meta, _ in samples:
        by_split[meta["split"]].add(meta["concept"])
    human = {concept for concept in by_split["human-train"]}
    assert not by_split["unseen-concept"] & human
    share = len(by_split["unseen-concept"]) / (len(by_split["unseen-concept"]) + len(human))
    assert 0.07 < share < 0.13
    web = sum(meta["style"] == "clip-art" for _, meta, _ in samples)
    for split in ("web-val", "web-test"):
        assert 0.04 < sum(meta["split"] == split for _, meta, _ in samples) / web < 0.07


def test_siblings_stay_together(samples):
    splits = defaultdict(set)
    for _, meta, _ in samples:
        if meta["split"] != "unseen-artist":
            splits[meta["sibling"]].add(meta["split"])
    assert all(len(found) == 1 for found in splits.values())


def test_no_near_identical_pictures_across_splits(samples, images):
    hashes, grids = signatures(images)
    split = np.array([meta["split"] for _, meta, _ in samples])
    seen = np.isin(split, list(TRAIN))
    for name in EVALUATION:
        mine = np.flatnonzero(split == name)
        others = np.flatnonzero(seen)
        pairs = near_identical((hashes[mine], grids[mine]), (hashes[others], grids[others]))
        assert not pairs, [(samples[mine[i]][1]["captions"], samples[others[j]][1]["captions"]) for i, j in pairs[:3]]
        seen |= split == name


def test_examples_are_from_the_test_split(samples):
    test = {content for _, meta, content in samples if meta["split"] == "web-test"}
    pictures = {Image.open(io.BytesIO(content)).convert("RGB").tobytes() for content in test}
    examples = sorted((DATA / "examples").glob("*.png"))
    assert len(examples) >= 6
    for path in examples:
        assert Image.open(path).convert("RGB").tobytes() in pictures, path.name
    labels = (DATA / "examples" / "labels.txt").read_text("utf-8").split("\n")
    assert all(path.stem.replace("-", " ") in labels for path in examples)
