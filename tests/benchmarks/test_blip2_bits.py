"""The benchmark of a language model in fewer bits: what it measures of a small second stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models.small_llm import llm_folder
from tests.tasks.small import COLOURS, plain
from tests.tasks.test_ask import model as speaker

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import blip2_bits

    speaker().save(tmp_path / "speaker")
    settings = json.loads((tmp_path / "speaker" / "config.json").read_text())
    settings["config"]["llm"] |= {"name": str(llm_folder(tmp_path / "llm"))}
    (tmp_path / "speaker" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "pictures").mkdir()
    for name in COLOURS:
        plain(name).save(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text(f"a {name} box")
    words = ["--model", str(tmp_path / "speaker"), "--data", str(tmp_path / "pictures"), "--threads", "1"]
    blip2_bits.main([*words, "--weights", "fp32", "int8", "--out", str(tmp_path)])
    whole, small = json.loads((tmp_path / "blip2_bits-speaker-cpu.json").read_text("utf-8"))["runs"]
    assert whole["tokens"] == small["tokens"] > len(COLOURS)
    assert small["llm_mb"] < whole["llm_mb"]  # embeddings and head stay
    assert 0 < abs(whole["lm_loss"] - small["lm_loss"]) < 0.05
    page = (tmp_path / "blip2_bits-speaker-cpu.md").read_text("utf-8")
    assert f"| int8 | {small['llm_mb']:,.0f} | {small['lm_loss']:.3f} |" in page
