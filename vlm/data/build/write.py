"""Shards, manifest, licences and label table of the built set."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.data.build.human import Concept
from vlm.data.build.packages import OPENMOJI, PACKAGES, Package
from vlm.data.samples import stable_id
from vlm.data.shards import ShardWriter

if TYPE_CHECKING:
    from vlm.data.build import Drawn

SPLITS = ("human-train", "web-train", "unseen-concept", "web-val", "web-test", "unseen-artist")
SAMPLES = 3000
NOTES = {
    "human-train": "emoji art, clean names: for training",
    "web-train": "clip art with its uploaders' texts, cleaned: for training",
    "unseen-concept": "emoji concepts held out in every style: evaluation",
    "web-val": "clip art, held out: validation while training",
    "web-test": "clip art, held out: evaluation",
    "unseen-artist": "OpenMoji, an artist never trained on: evaluation only",
}


def write_set(
    out: Path,
    drawn: Sequence[Drawn],
    concepts: Mapping[str, Concept],
    left_out: Counter[str],
    folders: Mapping[Package, Path],
) -> dict[str, Any]:
    """Write everything under `out`; the manifest, which says that the set is whole, comes last."""
    by_split: dict[str, list[Drawn]] = defaultdict(list)
    for one in drawn:
        by_split[one.split].append(one)
    shards = []
    for split in SPLITS:
        folder = out / "openmoji" if split == "unseen-artist" else out
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{split}-*.tar.gz"):
            stale.unlink()
        rows = sorted(by_split[split], key=lambda one: stable_id(one.item.key))
        with ShardWriter(str(folder / f"{split}-{{:05d}}.tar.gz"), samples=SAMPLES) as writer:
            for one in rows:
                writer.write(one.item.key, one.content, "webp", one.item.described(split))
        for number, path in enumerate(writer.shards):
            part = rows[number * SAMPLES : (number + 1) * SAMPLES]
            shards.append(_shard_entry(path, out, split, part))
    shutil.copyfile(folders[OPENMOJI] / OPENMOJI.licence_file, out / "openmoji" / "LICENSE")
    _write_labels(out / "labels.tsv", concepts)
    manifest = {
        "side": 96,
        "splits": {split: len(by_split[split]) for split in SPLITS},
        "concepts": len(concepts),
        "bytes": sum(shard["bytes"] for shard in shards),
        "left_out": dict(sorted(left_out.items())),
        "packages": [
            {"package": p.label, "client": p.client, "licence": p.licence, "stated in": p.licence_file}
            for p in PACKAGES
        ],
        "shards": shards,
    }
    _write_licences(out / "LICENSES.md")
    _write_readme(out / "README.md", manifest, by_split)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return manifest


def _shard_entry(path: Path, out: Path, split: str, rows: Sequence[Drawn]) -> dict[str, Any]:
    content = path.read_bytes()
    return {
        "file": path.relative_to(out).as_posix(),
        "split": split,
        "samples": len(rows),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "licences": dict(sorted(Counter(one.item.package.licence for one in rows).items())),
        "sources": dict(sorted(Counter(one.item.package.label for one in rows).items())),
    }


def _write_labels(path: Path, concepts: Mapping[str, Concept]) -> None:
    lines = ["concept\tname\tgroup\tflag"]
    lines += [f"{c.key}\t{c.name}\t{c.group}\t{int(c.flag)}" for c in concepts.values()]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _write_licences(path: Path) -> None:
    lines = ["# Licences of the pictures and texts", ""]
    lines += ["Each sample's JSON names its own source, licence and attribution. The sources:", ""]
    lines += ["| package | licence | attribution | stated in the package's |", "|---|---|---|---|"]
    lines += [f"| {p.label} | {p.licence} | {p.attribution} | `{p.licence_file}` |" for p in PACKAGES]
    lines += [
        "",
        "Names, tags and groups of the emoji are Emojibase's. Pictures were resized to 96 pixels on white;",
    ]
    lines += ["nothing else was changed. OpenMoji (CC-BY-SA-4.0) lies in a folder of its own with its licence, is"]
    lines += ["used for evaluation only, and is no part of the Python package or of any weights.", ""]
    path.write_text("\n".join(lines), "utf-8")


def _write_readme(path: Path, manifest: Mapping[str, Any], by_split: Mapping[str, Sequence[Drawn]]) -> None:
    lines = ["# The repository's own data", ""]
    lines += ["Image-text pairs at 96 pixels, as WebDataset shards (`KEY.webp`, `KEY.json`), gzipped to be small;"]
    lines += ["`vlm` unpacks each once into its cache. Made by `vlm data build --out data` from public packages;"]
    lines += ["licences: LICENSES.md; counts and sha256: manifest.json.", ""]
    lines += ["| split | pictures | captions | what it is |", "|---|---|---|---|"]
    for split in SPLITS:
        captions = sum(len(one.item.meta["captions"]) for one in by_split[split])
        lines.append(f"| `{split}` | {len(by_split[split]):,} | {captions:,} | {NOTES[split]} |")
    lines += [
        "",
        "JSON of a sample: `captions` (the first is its main name), `name`, `tags`, `concept` (emoji code",
    ]
    lines += ["points, or `web:` and the caption), `style`, `group`, `subgroup`, `sibling` (drawings that stay in"]
    lines += ["one split), `source`, `licence`, `attribution`, `split`; clip art also `web` (the uploader's text)"]
    lines += [
        "and `description`. `labels.tsv` lists all emoji concepts (concept, name, group, flag).",
        "",
        "Left out:",
        "",
    ]
    lines += [f"- {count:,}: {reason}" for reason, count in manifest["left_out"].items()]
    path.write_text("\n".join(lines) + "\n", "utf-8")
