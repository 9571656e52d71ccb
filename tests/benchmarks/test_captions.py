"""The benchmark of captions: commands that exist, and how reports become rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {
    name: {"value": value, "low": value / 2, "high": 2 * value, "chance": 0.002, "count": 9}
    for name, value in {"BLEU-1": 0.1, "BLEU-4": 0.02, "ROUGE-L": 0.3, "CIDEr-D": 0.25}.items()
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import captions

    return captions


def test_commands_that_there_are(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.apps.cli import app

    asked: list[list[str]] = []

    def run(command: str) -> None:
        context: Any = get_command(app)
        words = command.split()
        asked.append(words)
        while hasattr(context, "commands"):
            context, words = context.commands[words[0]], words[1:]
        context.make_context(context.name, words)
        if asked[-1][0] == "eval":
            folder = Path(asked[-1][-1])
            folder.mkdir()
            (folder / "report.json").write_text(json.dumps({"figures": FIGURES, "pictures": 9}))

    monkeypatch.setattr(bench, "_vlm", run)
    job = bench.run_job("tiny-blip", "web-test", "nucleus 0.9")
    assert [words[0] for words in asked] == ["caption", "eval"] and "nucleus" in asked[0]
    assert asked[0][asked[0].index("--output") + 1] == asked[1][2], "what is scored is what was said"
    assert all("/tmp" not in command and str(ROOT) not in command for command in job["commands"])
    assert all(list(ROOT.glob(place)) for place in bench.SHARDS.values())


def test_rows_by_hand(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = {"figures": FIGURES, "pictures": 9}
    monkeypatch.setattr(bench, "run_job", lambda model, data, search: {"data": data, "search": search} | made)
    bench.main(["--data", "web-test", "--out", str(tmp_path)])
    lines = (tmp_path / "captions-tiny-blip.md").read_text("utf-8").splitlines()
    assert lines[2].split(" | ")[1:] == [
        "beams 3", "9", "10.0 [5.0, 20.0]", "2.0 [1.0, 4.0]", "30.0 [15.0, 60.0]", "25.0 [12.5, 50.0]", "0.2 |",
    ]  # fmt: skip
    assert len(lines) == 2 + len(bench.SEARCHES)
