"""The captioning benchmark measures what it says."""

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
    import generate

    return generate


def test_the_command_writes_its_results(bench: ModuleType, tmp_path: Path) -> None:
    words = ["--preset", "tiny", "--batch", "2", "--tokens", "5", "--rounds", "2", "--threads", "1"]
    bench.main([*words, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "generate-tiny-cpu.json").read_text("utf-8"))
    assert set(result["searches"]) == {"1", "3"}
    for search in result["searches"].values():
        assert search["different_tokens"] > 2
        parts = {name: part["seconds"] for name, part in search["parts"].items()}
        for side in ("vlm", "transformers"):
            whole = np.add(parts["picture"][side], parts["decoding"][side])
            assert whole == pytest.approx(parts["whole"][side])
            assert search["memory_mb"][side]["searching"] > 100
        ratio = search["parts"]["decoding"]["ratio"]
        each = np.divide(parts["decoding"]["transformers"], parts["decoding"]["vlm"])
        assert ratio["each"] == pytest.approx(each) and ratio["median"] == pytest.approx(np.median(each))
    page = (tmp_path / "generate-tiny-cpu.md").read_text("utf-8")
    assert f"**{ratio['median']:.2f}**" in page and "| beams 3 | whole |" in page


def test_tokens_that_differ_or_say_nothing_stop_it(bench: ModuleType) -> None:
    tokens = torch.arange(6).view(2, 3)
    assert bench.check_tokens({"vlm": tokens, "transformers": tokens.clone()}, 3) == 6
    for other in (tokens.flip(0), tokens[:, :2]):
        with pytest.raises(AssertionError, match="the tokens differ"):
            bench.check_tokens({"vlm": tokens, "transformers": other}, 3)
    with pytest.raises(AssertionError, match="repeat one token"):
        bench.check_tokens({"vlm": tokens * 0, "transformers": tokens * 0}, 3)


def test_the_peak_begins_anew(bench: ModuleType) -> None:
    big = torch.ones(50_000_000)
    before = bench.peak_mb("cpu")
    del big
    if not bench.reset_peak():
        pytest.skip("this system keeps the peak")
    assert bench.peak_mb("cpu") < before - 100


def test_bad_options_are_named(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--tokens", "0"])
    assert "--tokens must be at least 1" in capsys.readouterr().err
