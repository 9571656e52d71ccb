"""The CapFilt benchmark measures what it says."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import capfilt

    return capfilt


def test_the_command_writes_its_results(bench: ModuleType, tmp_path: Path) -> None:
    sizes = ["--preset", "tiny", "--pictures", "5", "--batch", "2", "--tokens", "4", "--rounds", "2", "--threads", "1"]
    bench.main([*sizes, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "capfilt-tiny-cpu.json").read_text("utf-8"))
    seconds = result["seconds"]
    each = [there / here for here, there in zip(seconds["vlm"], seconds["transformers"], strict=True)]
    assert result["ratio"]["each"] == pytest.approx(each)
    assert result["pairs_per_second"]["vlm"] == pytest.approx(10 / (sum(seconds["vlm"]) / 2))
    assert 0 <= result["largest_difference_of_scores"] < 1e-4
    assert f"**{result['ratio']['median']:.2f}**" in (tmp_path / "capfilt-tiny-cpu.md").read_text("utf-8")


def test_sides_that_differ_are_refused(bench: ModuleType) -> None:
    one = [(("a", 0.5), ("b of", 0.25)), (("c", 0.6), ("d", 0.75))]
    assert bench.check({"vlm": one, "transformers": one}) == 0
    for wrong in ((("a", 0.5), ("other", 0.25)), (("a", 0.55), ("b of", 0.25))):
        with pytest.raises(AssertionError, match="differ"):
            bench.check({"vlm": one, "transformers": [wrong, one[1]]})
    for alike, what in (
        ([(("a", 0.5), ("b", 0.5)), (("c", 0.6), ("b", 0.6))], "repeat one word"),
        ([(("a", 0.5), ("b of", 0.5)), (("c", 0.5), ("d", 0.6))], "score alike"),
    ):
        with pytest.raises(AssertionError, match=what):
            bench.check({"vlm": alike, "transformers": alike})
