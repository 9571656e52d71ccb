"""The pointing benchmark runs every method of a model and writes what the command reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_writes_its_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pointing

    pointing.main(["--data", "unseen-concept", "--collages", "2", "--out", str(tmp_path)])
    values = json.loads((tmp_path / "pointing-tiny-clip.json").read_text("utf-8"))
    assert [job["method"] for job in values["jobs"]] == ["cam", "relevance", "rollout"]
    assert all(job["collages"] == 2 and job["random weights"]["hits"]["count"] == 2 for job in values["jobs"])
    lines = (tmp_path / "pointing-tiny-clip.md").read_text("utf-8").splitlines()
    assert len(lines) == 5 and lines[2].startswith("| unseen-concept | cam | 2 |")
