"""BLIP-2's generation benchmark measures what it says."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import blip2_generate

    return blip2_generate


def test_the_command_writes_its_results(bench: ModuleType, tmp_path: Path) -> None:
    words = ["--preset", "tiny", "--batch", "1", "2", "--tokens", "5", "--rounds", "2", "--threads", "1"]
    bench.main([*words, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "blip2_generate-tiny-cpu.json").read_text("utf-8"))
    assert [(run["batch"], run["beams"]) for run in result["runs"]] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for run in result["runs"]:
        assert run["different_tokens"] > 1
        each = np.divide(run["seconds"]["transformers"], run["seconds"]["vlm"])
        assert run["ratio"]["each"] == pytest.approx(each) and run["ratio"]["median"] == pytest.approx(np.median(each))
    page = (tmp_path / "blip2_generate-tiny-cpu.md").read_text("utf-8")
    assert f"**{run['ratio']['median']:.2f}**" in page and "| 2 | beams 3 |" in page


def test_tokens_that_differ_or_say_nothing_stop_it(bench: ModuleType) -> None:
    tokens = torch.arange(8).view(2, 4)
    assert bench.check_tokens({"vlm": tokens, "transformers": tokens.clone()}, 4) == 6
    for other in (tokens.flip(0), tokens[:, :2]):
        with pytest.raises(AssertionError, match="the tokens differ"):
            bench.check_tokens({"vlm": tokens, "transformers": other}, 4)
    with pytest.raises(AssertionError, match="repeat one token"):
        bench.check_tokens({"vlm": tokens * 0, "transformers": tokens * 0}, 4)


def test_bad_options_are_named(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--batch", "0"])
    assert "--batch and --beams must be at least 1" in capsys.readouterr().err
