"""The memory benchmark of BLIP-2's recipes counts what its networks hold, measures, and runs nothing that won't fit."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import blip2_peak

    return blip2_peak


def held(network: Any) -> int:
    """Bytes of all that a network has, but for buffers that are no weights (positions' frequencies)."""
    buffers = [tensor for name, tensor in network.named_buffers() if "inv_freq" not in name]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*network.parameters(), *buffers])


@pytest.mark.parametrize(
    ("recipe", "stage", "weights", "rest"),
    [
        ("tiny", "blip2", "", "fp32"),
        ("tiny", "blip2-llm", "int8", "fp32"),
        ("base", "blip2-llm", "bf16", "fp32"),
        ("base", "blip2-llm", "bf16", "bf16"),
    ],
)
def test_a_network_holds_what_is_counted(bench: ModuleType, recipe: str, stage: str, weights: str, rest: str) -> None:
    import blip2_shapes

    case = bench.Case(recipe, stage, "run", weights, rest, small=True)
    network = blip2_shapes.build(case, blip2_shapes.settings(case)).to(dtype=blip2_shapes.kind_of(rest))
    assert bench.count(case) == held(network)
    matrix = network.qformer.query_tokens
    assert 0.01 < float(matrix.detach().float().std()) < 0.03 and len(matrix.unique()) > matrix.numel() / 4


def test_a_step_has_what_is_counted_and_activations(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients and moments, less of the words that tiny's first stage freezes."""
    import blip2_shapes

    made: list[tuple[Any, Any]] = []

    def seen(network: Any, batch: Any, optimizer: Any, context: Any, number: int) -> None:
        from vlm.train.step import backward

        backward(network, batch, context, step=number, loss_scale=1.0)
        made.append((network, optimizer))

    monkeypatch.setattr(blip2_shapes, "make_step", seen)
    case = bench.Case("tiny", "blip2", "train", batch=2, small=True)
    with blip2_shapes.train(case, "cpu") as once:
        once()
    network, optimizer = made[0]
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    whole = held(network) + sum(tensor.numel() * tensor.element_size() for tensor in [*moments, *gradients])
    assert bench.count(case) == whole > held(network)


def test_captions_have_their_length(bench: ModuleType) -> None:
    with bench.write(bench.Case("tiny", "blip2-llm", "run", "fp32", small=True), "cpu") as once:
        assert once().ids.shape == (1, 1, bench.NEW_TOKENS)


def test_what_wont_fit_is_refused(bench: ModuleType) -> None:
    assert bench.refusal(12.0, 15.0, 14.1) == ""
    assert bench.refusal(16.3, 15.0, 64.0) == "not run: needs 16.3 GB, more than the 15 allowed"
    assert bench.refusal(12.0, 15.0, 13.5) == "not run: needs 12.0 GB, 11.5 to be had"
    assert 0.1 < bench.available("cpu") < 10_000


def test_nothing_too_large_is_begun(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(*_: Any) -> None:
        raise AssertionError("this would have been run")

    monkeypatch.setattr(bench, "apart", apart)
    monkeypatch.setattr(bench, "cases", lambda recipe: [bench.Case(recipe, "blip2-llm", "train", "fp32", batch=2)])
    bench.main(["--recipe", "base", "--out", str(tmp_path)])
    row = json.loads((tmp_path / "blip2_peak.json").read_text("utf-8"))["rows"][0]
    assert row["counted_bytes"] == 16264290304  # as blip2_memory counts it
    assert "| 16.26 | not run: needs 17.3 GB, more than the 15 allowed | - | - |" in (
        tmp_path / "blip2_peak.md"
    ).read_text("utf-8")


def test_a_process_that_passes_the_limit_is_told_of(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="DefaultCPUAllocator: can't allocate memory: you tried")
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: failed)
    case = bench.Case("base", "blip2", "run")
    told = "not run to its end: building or running it takes more than the 15 GB allowed"
    assert bench.apart(case, [], 15.0) == {"not_run": told}
    failed.stderr = "something else"
    with pytest.raises(SystemExit, match="something else"):
        bench.apart(case, [], 15.0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read as Linux tells them")
def test_a_peak_is_measured(bench: ModuleType) -> None:
    """Weights make nearly all of a caption's peak; a step of more rows takes more."""
    words = ["--threads", "1"]
    case = bench.Case("tiny", "blip2", "run")
    found = bench.apart(case, words, 15.0)
    assert bench.count(case) / 1e6 == pytest.approx(found["peak_mb"] - found["imports_mb"], rel=0.25)
    step = replace(case, act="train", batch=2)
    few, many = (bench.apart(replace(step, batch=rows), words, 15.0)["peak_mb"] for rows in (2, 16))
    assert found["peak_mb"] < few < many


def test_bad_options_are_named(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--limit", "0"])
    assert "--limit must be above 0" in capsys.readouterr().err
    assert torch.float32 is sys.modules["blip2_shapes"].kind_of("fp32")
