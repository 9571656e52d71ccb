"""The table of stages: what each family is asked, and how reports become rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[2]
FIGURE = {"value": 0.5, "low": 0.25, "high": 0.75, "chance": 0.002, "count": 9}
RECALL = {"text_to_image": {"R@1": FIGURE}, "image_to_text": {"R@1": FIGURE | {"value": 0.6}}}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import evaluate_stages

    return evaluate_stages


@pytest.mark.parametrize(
    ("family", "asked"),
    [
        ("clip", {"zero-shot", "retrieval"}),
        ("vilt", {"matching", "retrieval"}),
        ("albef", {"zero-shot", "retrieval", "matching"}),
    ],
)
def test_a_family_is_asked_what_it_can(bench: ModuleType, family: str, asked: set[str]) -> None:
    from vlm.apps.cli import app

    jobs = bench.jobs_of(family)
    assert {job.split()[1] for job in jobs.values()} == asked
    assert ("--rerank 64" in jobs.get("clip art, 500", "")) == (family == "albef")
    assert all("--gallery 100" in job for name, job in jobs.items() if name == "clip art, 100")
    for job in jobs.values():  # commands that exist, with options that they have
        command: Any = get_command(app)
        words = job.split()
        while hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        command.make_context(command.name, words)


def test_rows_by_hand(bench: ModuleType) -> None:
    jobs = {
        "unseen": {"top-1": FIGURE, "model": "m", "labels": 3},
        "matching": {"accuracy": FIGURE, "order": FIGURE, "seed": 0},
        "clip art": {"score": "itc", "recall": RECALL, "rerank": {"k": 64, "score": "itm", "recall": RECALL}},
        "all pairs": {"score": "itm", "recall": RECALL, "pairs": 9},
    }
    rows = bench.rows_of("stage", jobs)
    assert [row[1:3] for row in rows] == [
        ["unseen", "top-1"], ["matching", "accuracy"], ["matching", "order"],
        ["clip art", "text to image R@1, by ITC"], ["clip art", "image to text R@1, by ITC"],
        ["clip art", "text to image R@1, 64 re-ranked by ITM"], ["clip art", "image to text R@1, 64 re-ranked by ITM"],
        ["all pairs", "text to image R@1, by ITM"], ["all pairs", "image to text R@1, by ITM"],
    ]  # fmt: skip
    assert rows[0] == ["stage", "unseen", "top-1", "50.0 [25.0, 75.0]", "0.20"] and rows[4][3].startswith("60.0")


def test_the_command_writes_its_results(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "run_job", lambda job, place: {"command": f"vlm {job} -m {place}", "top-1": FIGURE})
    for more, name in (([], "stages"), (["--name", "other"], "other")):
        monkeypatch.setattr("sys.argv", ["evaluate_stages.py", "tiny-clip", "--out", str(tmp_path), *more])
        bench.main()
        values = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
        assert values["command"] == " ".join(["python benchmarks/evaluate_stages.py tiny-clip", *more])
    assert set(values["stages"]["tiny-clip"]) == set(bench.jobs_of("clip"))
    assert (tmp_path / "stages.md").read_text("utf-8").count("| tiny-clip |") == 4


def test_two_models_of_one_name_are_refused(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "run_job", None)  # nothing is measured before
    monkeypatch.setattr("sys.argv", ["evaluate_stages.py", "tiny-clip", "tiny-clip", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="second model called 'tiny-clip'"):
        bench.main()
    assert not list(tmp_path.iterdir())
