"""`vlm reproduce`: its table after each run, and what it refuses."""

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


def test_blip2_goes_on_from_its_table(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options reach both stages; models of reference stand in the table without seeds, and are measured once."""
    trained: list[list[str]] = []
    measured: list[str] = []

    def train(stage: str, where: Path, settings: list[str], *_: object) -> None:
        where.mkdir(parents=True)
        trained.append(settings)

    def reference(name: str, *_: object) -> dict[str, float]:
        measured.append(name)
        return {"cider": 0.25, "parameters": 2_000_000}

    place = "vlm.tasks.reproduce.blip2."
    monkeypatch.setattr("vlm.tasks.reproduce.grid._train", train)
    monkeypatch.setattr(f"{place}_prepare", lambda out, cell, seed, stage1, device: [f"start={stage1}"])
    monkeypatch.setattr(f"{place}measure", lambda where, *_: {"cider": 0.5, "trained": 1e6, "parameters": 9e6})
    monkeypatch.setattr(f"{place}measure_reference", reference)
    where = ("reproduce", "blip2", "--steps", "7,5", "--batch", "6,4", "--captioned", "3", "--start", "tiny-clip")
    done = run(*where, "--out", tmp_path / "a", "--table", tmp_path / "table", "--seeds", "0,1")
    assert done.code == 0, done.err
    page = (tmp_path / "table.md").read_text("utf-8")
    assert page in done.out
    rows = [line.split(" | ") for line in page.splitlines()]
    assert rows[2] == [
        "| ITC + ITM + ITG, then stage 2", "7 + 5", "2", *["-"] * 5, "50.0 [50.0, 50.0]", "1.0", "9.0 |",
    ]  # fmt: skip
    assert rows[-1] == ["| tiny-blip", "none, as shipped", "-", *["-"] * 5, "25.0", "-", "2.0 |"]
    assert len(trained) == 6 and all("train.steps=5" in one and "loader.batch_size=4" in one for one in trained)
    assert all("train.steps=7" in one[-1] and "loader.batch_size=6" in one[-1] for one in trained)
    assert all('["tiny-clip"]' in one[-1] for one in trained)
    again = run(*where, "--out", tmp_path / "b", "--table", tmp_path / "table", "--seeds", "1,2")
    assert again.code == 0 and len(trained) == 9 and measured == ["tiny-clip", "tiny-albef", "tiny-blip"]
    assert len(json.loads((tmp_path / "table.json").read_text("utf-8"))["results"]) == 9 + 3


@pytest.mark.parametrize("given", [("--steps", "9"), ("--batch", "9,9,9"), ("--steps", "9,0"), ("--batch", "a,b")])
def test_blip2_has_two_stages(run: Run, tmp_path: Path, given: tuple[str, str]) -> None:
    done = run("reproduce", "blip2", "--out", tmp_path / "out", *given)
    assert done.code == 2 and "expected" in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


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
