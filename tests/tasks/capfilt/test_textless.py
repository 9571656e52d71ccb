"""Web pictures that came without a text: each gets a synthetic one, whatever engine runs and wherever it goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.made import said, tar
from tests.tasks.capfilt.small import ALONE, HERE, content, noise, settings
from vlm.data.sources import open_source
from vlm.tasks.capfilt import engines
from vlm.tasks.capfilt.run import run_capfilt
from vlm.tasks.capfilt.settings import CapfiltConfig
from vlm.tasks.capfilt.units import find_units
from vlm.tasks.capfilt.work import Job, open_sets

BARE = ("b", "c", "f")
"""Pictures without any text; of the others one has a caption, the rest a web text alone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A web set of seven pictures."""
    folder = tmp_path_factory.mktemp("textless")
    settings(folder)
    members = [(f"{key}.png", noise(i)) for i, key in enumerate("abcdefg")]
    members += [("a.json", said("red dog")), ("c.json", b'{"captions": [], "licence": "CC0"}')]
    members += [(f"{key}.json", json.dumps({"web": f"IMG {key}"}).encode()) for key in "deg"]
    (folder / "bare").mkdir()
    tar(folder / "bare" / "x.tar", sorted(members))
    return folder


def config(folder: Path, **changes: Any) -> CapfiltConfig:
    return replace(settings(folder, filtering=False), web=(str(folder / "bare"),), **changes)


def test_every_picture_is_captioned_and_only_found_texts_are_judged_as_such(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_capfilt(config(folder), out, ALONE, how=HERE, pretrain=False)
    rows = [row for path in sorted((out / "judged").glob("web-*")) for row in json.loads(path.read_text())["rows"]]
    kinds = {row["key"]: [text["provenance"] for text in row["texts"]] for row in rows}
    assert kinds == {key: ["synthetic"] if key in BARE else ["web", "synthetic"] for key in "abcdefg"}
    assert all(text["text"].strip() and 0 < text["itm"] < 1 for row in rows for text in row["texts"])
    source = open_source(str(out / "data"))
    metas = [source.meta(number) for number in range(len(source))]
    found = {meta["key"]: meta for meta in metas if meta["key"] in BARE}
    assert {key: [text["provenance"] for text in meta["texts"]] for key, meta in found.items()} == {
        key: ["synthetic"] for key in BARE
    }
    assert all(meta["captions"] == [meta["texts"][0]["text"]] for meta in found.values())
    assert found["c"]["licence"] == "CC0"
    report = json.loads((out / "report.json").read_text())
    assert report["pictures"]["web"] == {"pictures": 7, "with_kept_text": 7, "without_text": 3, "unreadable": 0}
    assert report["pictures"]["human"]["without_text"] == 0 and not report["left_out_on_opening"]
    assert {kind: report["texts"][kind]["texts"] for kind in ("web", "synthetic")} == {"web": 4, "synthetic": 7}
    assert "| web | 7 | 0 | 3 | 7 |" in (out / "report.md").read_text()
    # Going on after a break, and an actor of the other engine, give the same.
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (again / "judged" / "web-00000.json").unlink()
    (again / "data" / "web-00000.tar").unlink()
    run_capfilt(config(folder), again, ALONE, how=HERE, pretrain=False)
    assert content(again) == content(out)


def test_an_actor_gives_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(folder, filtering=True, threshold=0.985)
    run_capfilt(given, tmp_path / "local", ALONE, how=HERE, pretrain=False)
    sources = open_sets(given)
    units = find_units(sources, given.shard_samples)
    rows = {name: np.array([getattr(unit, name) for unit in units]) for name in ("kind", *engines.NUMBERS)}
    prints = {kind: source.fingerprint() for kind, source in sources.items()}
    monkeypatch.chdir(tmp_path)  # to be left again afterwards
    place = engines._Place(str(tmp_path), None, prints, torch.get_num_threads())
    job = Job(given, tmp_path / "actor", given.captioner, given.judge, HERE.batch_size, "cpu")
    assert set(engines._Actor(job, place)(rows)["error"]) == {""}
    local = {name: value for name, value in content(tmp_path / "local").items() if not name.startswith("report.")}
    assert content(tmp_path / "actor") == local


def test_without_a_captioner_they_have_no_text(folder: Path, tmp_path: Path) -> None:
    """A whole run, and one that takes the texts of another."""
    run_capfilt(config(folder), tmp_path / "both", ALONE, how=HERE, pretrain=False)
    alone = config(folder, synthetic=False, captioner="")
    run_capfilt(alone, tmp_path / "alone", ALONE, how=HERE, pretrain=False)
    taken = config(folder, synthetic=False, captioner="", judge="", judged=str(tmp_path / "both"))
    run_capfilt(taken, tmp_path / "taken", ALONE, how=HERE, pretrain=False)
    one, other = (
        {name: value for name, value in content(tmp_path / out).items() if not name.startswith("report.")}
        for out in ("alone", "taken")
    )
    assert one == other
    report = json.loads((tmp_path / "taken" / "report.json").read_text())
    assert report["pictures"]["web"] == {"pictures": 7, "with_kept_text": 4, "without_text": 3, "unreadable": 0}
