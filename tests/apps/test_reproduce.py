"""`vlm reproduce albef`: its table after each run, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.apps.conftest import Run


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are not trained, and measure as their seed says."""
    monkeypatch.setattr("vlm.tasks.reproduce.grid._train", lambda stage, run, *_: run.mkdir(parents=True))
    monkeypatch.setattr(
        "vlm.tasks.reproduce.albef.measure", lambda run, device: {"match_order": 0.5 + 0.1 * int(run.name[-1])}
    )


def test_the_table_is_written_and_gone_on_with(run: Run, stubbed: None, tmp_path: Path) -> None:
    where = ("reproduce", "albef", "--noise", "0", "--table", tmp_path / "table", "--out")
    done = run(*where, tmp_path / "a", "--seeds", "0,1")
    assert done.code == 0, done.err
    page = (tmp_path / "table.md").read_text("utf-8")
    assert page in done.out and "| + MoD | 0% shuffled | 2 | - | - | - | - | 55.0 [-8.5, 118.5] |" in page
    values = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert len(values["results"]) == 8 and values["command"].startswith("vlm reproduce albef")
    (place,) = values["surroundings"]
    assert place["machine"]["cores"] and place["packages"]["torch"]
    again = run(*where, tmp_path / "b", "--seeds", "0,1,2")
    assert again.code == 0 and len(list((tmp_path / "b").iterdir())) == 4  # those of seed 2
    assert len(json.loads((tmp_path / "table.json").read_text("utf-8"))["results"]) == 12
    other = run(*where, tmp_path / "b", "--seeds", "0", "--steps", "10")
    assert other.code == 2 and "was made with other settings" in other.err
    assert len(json.loads((tmp_path / "table.json").read_text("utf-8"))["results"]) == 12


def test_the_table_lies_beside_the_runs_if_nothing_else_is_said(run: Run, stubbed: None, tmp_path: Path) -> None:
    where = ("reproduce", "albef", "--noise", "0", "--out", tmp_path / "out")
    done = run(*where, "--seeds", "0")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "table.md").read_text("utf-8") in done.out
    assert run(*where, "--seeds", "1").code == 0  # what stands there stays in the table
    results = json.loads((tmp_path / "out" / "table.json").read_text("utf-8"))["results"]
    assert len(results) == 8 and {one["seed"] for one in results} == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seeds", "x"), "--seeds 'x': expected whole numbers"),
        (("--seeds", "0.5"), "expected whole numbers"),
        (("--seeds", ""), "at least one seed"),
        (("--noise", "many"), "--noise 'many': expected numbers"),
        (("--noise", "2"), "share from 0 to below 1"),
        (("--noise", ""), "at least one share"),
        (("--precision", "fp99"), "train.precision = 'fp99'"),
        (("--table", "else"), "else.json: no results of runs"),
    ],
)
def test_bad_options(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("else.json").write_text("[]")
    done = run("reproduce", "albef", "--out", "runs", *options)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert Path("else.json").read_text() == "[]" and not Path("runs").exists()
