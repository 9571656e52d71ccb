"""Texts and scores of an earlier CapFilt: what is made of them is what a whole run makes, and no model is needed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.capfilt.small import ALONE, HERE, content, med, settings
from vlm.errors import ConfigError, DataError
from vlm.generate import GenerationConfig
from vlm.tasks.capfilt import run as steps
from vlm.tasks.capfilt import work
from vlm.tasks.capfilt.run import run_capfilt
from vlm.tasks.capfilt.settings import CapfiltConfig, Execution

THRESHOLD = 0.985
BEAM = GenerationConfig("beam", max_new_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("capfilt")


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    """A finished run."""
    run(settings(folder, threshold=THRESHOLD), folder / "done")
    return folder / "done"


@pytest.fixture
def without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model can be loaded."""
    monkeypatch.setattr(steps, "load", None)
    monkeypatch.setattr(work, "load", None)


def run(config: CapfiltConfig, out: Path, how: Execution = HERE) -> None:
    run_capfilt(config, out, ALONE, how=how, pretrain=False)


def taking(folder: Path, judged: Path, **changes: Any) -> CapfiltConfig:
    """Settings that take the texts of a folder, and name no model."""
    given: dict[str, Any] = {"threshold": THRESHOLD, "captioner": "", "judge": "", "judged": str(judged)}
    return settings(folder, **given | changes)


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def assert_same(taken: Path, whole: Path, judged: Path) -> None:
    """Every byte but for where the texts came from."""
    said = ("report.json", "report.md")
    one, other = ({name: has for name, has in content(out).items() if name not in said} for out in (taken, whole))
    assert one == other and len(one) > 5
    found = report(taken)
    assert found["settings"].pop("judged") == str(judged)
    assert found == report(whole)
    line = f"\nTexts and scores are those of {judged}.\n"
    markdown = (taken / "report.md").read_text()
    assert line in markdown and markdown.replace(line, "", 1) == (whole / "report.md").read_text()
    assert (taken / "models.json").read_bytes() == (whole / "models.json").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 0.97},
        {"threshold": 0.9999},  # nothing is left of the web
        {"filtering": False},
        {"synthetic": False},
        {"synthetic": False, "generation": BEAM},
        {"synthetic": False, "filtering": False},
    ],
    ids=str,
)
def test_what_a_whole_run_gives(
    folder: Path, done: Path, tmp_path: Path, request: pytest.FixtureRequest, changes: dict[str, Any]
) -> None:
    run(settings(folder, **{"threshold": THRESHOLD} | changes), tmp_path / "whole")
    request.getfixturevalue("without_models")
    before = content(done)
    run(taking(folder, done, **changes), tmp_path / "taken")
    assert_same(tmp_path / "taken", tmp_path / "whole", done)
    assert content(done) == before != content(tmp_path / "taken")


@pytest.mark.usefixtures("without_models")
def test_it_goes_on_and_can_be_taken_from_again(folder: Path, done: Path, tmp_path: Path) -> None:
    config = taking(folder, done, filtering=False)
    run(config, tmp_path / "one")
    whole = content(tmp_path / "one")
    (tmp_path / "one" / "judged" / "web-00001.json").unlink()
    (tmp_path / "one" / "data" / "web-00001.tar").write_bytes(b"half")
    run(config, tmp_path / "one")
    assert content(tmp_path / "one") == whole
    run(taking(folder, tmp_path / "one"), tmp_path / "two")
    assert_same(tmp_path / "two", done, tmp_path / "one")
    with pytest.raises(ConfigError, match=r"settings\.threshold: 0\.985 before, 0\.5 now"):
        run(replace(config, threshold=0.5), tmp_path / "one")
    run(taking(folder, done, synthetic=False), tmp_path / "found")
    with pytest.raises(ConfigError, match="no synthetic texts were written there"):
        run(taking(folder, tmp_path / "found"), tmp_path / "three")
    run(taking(folder, tmp_path / "found", synthetic=False, filtering=False), tmp_path / "three")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 3}, r"settings\.seed: 0 before, 3 now"),
        ({"generation": BEAM}, r"settings\.generation\.strategy: \"nucleus\" before, \"beam\" now"),
        ({"shard_samples": 5}, r"settings\.shard_samples: 4 before, 5 now"),
        ({"web_field": "alt"}, r"settings\.web_field: \"web\" before, \"alt\" now"),
        ({"check_pictures": 2}, r"settings\.check_pictures: 4 before, 2 now"),
        ({"web": "human"}, r"  data\.web: "),
        ({"check": "web"}, r"  data\.check: nothing before"),
        ({"judge": "captioner"}, r"  weights\.filter: "),
        ({"captioner": "filter"}, r"  weights\.captioner: "),
        ({"model": "captioner"}, r"  model: nothing before"),
    ],
)
def test_what_is_different_is_refused_by_name(
    folder: Path, done: Path, tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    for part, given in changes.items():
        if part in ("web", "check"):
            changes = {part: (str(folder / given),)}
        elif isinstance(given, str) and part != "web_field":
            changes = {part: str(folder / given)}
    with pytest.raises(ConfigError, match=name) as raised:
        run(replace(taking(folder, done, threshold=0.5), **changes), tmp_path / "out")
    assert str(raised.value).startswith(f"{done}: its texts and scores") and "threshold" not in str(raised.value)
    assert not (tmp_path / "out" / "capfilt.json").exists()


def test_models_that_are_named_as_well_may_be_the_same(folder: Path, done: Path, tmp_path: Path) -> None:
    named = {"captioner": str(folder / "captioner"), "judge": str(folder / "filter")}
    run(taking(folder, done, **named), tmp_path / "out")
    assert_same(tmp_path / "out", done, done)


def test_models_that_were_made_there_are_the_ones_named(folder: Path, tmp_path: Path) -> None:
    med().save(tmp_path / "med")
    made: dict[str, Any] = {"captioner": "", "judge": "", "model": str(tmp_path / "med")}
    run(settings(folder, **made, tune=("train.steps=1",)), tmp_path / "first")
    named = taking(folder, tmp_path / "first", threshold=0.6, model=made["model"], tune=("train.steps=1",))
    run(named, tmp_path / "second")
    assert not (tmp_path / "second" / "filter").exists()
    with pytest.raises(ConfigError, match=r"  training\.filter\.train\.steps: 1 before, 2 now"):
        run(replace(named, tune=("train.steps=2",)), tmp_path / "third")
    med(5).save(tmp_path / "med")
    with pytest.raises(ConfigError, match="  model: "):
        run(named, tmp_path / "third")
    run(replace(named, model="", tune=()), tmp_path / "third")
    assert content(tmp_path / "third") == content(tmp_path / "second")


@pytest.mark.usefixtures("without_models")
def test_a_folder_that_isnt_finished_is_refused(folder: Path, done: Path, tmp_path: Path) -> None:
    cut, out = tmp_path / "cut", tmp_path / "out"
    shutil.copytree(done, cut)
    (cut / "exchanged.json").unlink()
    (cut / "judged" / "human-00001.json").unlink()
    with pytest.raises(DataError, match=r"cut: isn't finished, human-00001, exchanged\.json missing; run what began"):
        run(taking(folder, cut), out)
    (cut / "models.json").unlink()
    with pytest.raises(ConfigError, match=r"models\.json: can't be read .* let that one finish"):
        run(taking(folder, cut), out)
    with pytest.raises(ConfigError, match=r"capfilt\.json: can't be read .* names the folder of a finished CapFilt"):
        run(taking(folder, tmp_path / "none"), out)
    with pytest.raises(ConfigError, match="can't take texts from itself"):
        run(taking(folder, done), done)
    assert not (out / "capfilt.json").exists()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "cat.png").write_bytes(b"a picture")
    with pytest.raises(ConfigError, match=r"own: holds other files \(such as cat\.png\) and no CapFilt"):
        run(taking(folder, done), tmp_path / "own")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["cat.png"]
    shutil.copytree(done, tmp_path / "torn")
    (tmp_path / "torn" / "judged" / "web-00001.json").write_text("{")
    with pytest.raises(DataError, match=r"web-00001\.json: can't be read .* delete it"):
        run(taking(folder, tmp_path / "torn"), out)
