"""The re-ranking benchmark measures what it says."""

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
    import rerank

    return rerank


def test_the_command_writes_its_results(bench: ModuleType, tmp_path: Path) -> None:
    bench.main(["--k", "6", "--whole", "4", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "rerank-tiny-cpu.json").read_text("utf-8"))
    rates, seconds = result["rates"], result["seconds"]
    assert rates["cached"] == pytest.approx(6 / np.median(seconds["cached"]))
    assert rates["albef whole"] == pytest.approx(4 / np.median(seconds["albef whole"]))
    each = [6 / a / (4 / b) for a, b in zip(seconds["cached"], seconds["albef whole"], strict=True)]
    assert result["ratio"]["each"] == pytest.approx(each)
    assert result["largest_difference_of_scores"] < 1e-4
    page = (tmp_path / "rerank-tiny-cpu.md").read_text("utf-8")
    assert f"**{result['ratio']['median']:.1f}** times" in page and "can't choose" in page


def test_hours_by_hand(bench: ModuleType) -> None:
    rates = {"cached": 1000.0, "albef whole": 100.0, "vilt whole": 50.0, "pictures": 10.0, "texts": 100.0}
    found = bench.hours(rates, 64)
    assert found["cached"]["all"] == pytest.approx((125e6 / 1000 + 500 + 250) / 3600)
    assert found["albef whole"]["all"] == pytest.approx(125e6 / 100 / 3600)
    assert found["cached"]["nearest"] == pytest.approx((30_000 * 64 / 1000 + 750) / 3600)
    assert found["vilt whole"]["nearest"] is None


def test_unequal_scores_stop_it(bench: ModuleType) -> None:
    options = bench.parse(["--k", "6", "--whole", "4"])
    model = bench.random_model("albef", "tiny", "cpu")
    texts = bench.random_texts(6, model.tokenizer.vocab_size)
    with torch.inference_mode():
        assert bench.check_scores(model, texts, options) < 1e-4
        own = model.network.match
        model.network.match = lambda pixels, tokens: own(pixels, tokens) + 0.01
        with pytest.raises(AssertionError):
            bench.check_scores(model, texts, options)


def test_bad_options_are_named(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--k", "0"])
    assert "--k must be at least 1" in capsys.readouterr().err
